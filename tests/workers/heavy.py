"""What a freeze moves and holds beside a trained head of 16 million elements, counted below the library.

With "blocks" as its argument, what the freeze of half of a model's blocks does that trains whole, 14 million elements.
Prints, as JSON, what each rank saw: bytes through torch.distributed at a drop and at a whole freeze, the elements whose
owner changed (by brute force from who owned what), and the peak memory of a step and of a freeze.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from aflora_dist.engines import transfer
from profiling.traffic import Traffic
from tests.workers.tiny import GLOBAL_BATCH, VOCABULARY, global_batch

CLASSES, WIDTH = 500_000, 32  # 16 million elements


def memory(field: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM the most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Until threads of the communication have let go of what they sent."""
    gc.collect()
    now, before = memory("VmRSS"), 0
    while now != before:
        time.sleep(0.1)
        now, before = memory("VmRSS"), now


def owners(engine: Any) -> dict[str, np.ndarray]:
    """name -> the rank whose optimizer state has each element of a trainable parameter."""
    held: list[Any] = [None] * dist.get_world_size()
    mine = [(p.key, p.start, p.data.numel()) for p in engine.pieces(engine.trainable, every_copy=False)]
    dist.all_gather_object(held, [piece for piece in mine if piece[0].startswith("value/")])
    found = {name: np.full(engine.numel(name), -1, dtype=np.int8) for name in engine.trainable}
    for rank, pieces in enumerate(held):
        for key, start, numel in pieces:
            found[key.removeprefix("value/")][start : start + numel] = rank
    assert all((owner >= 0).all() for owner in found.values())
    return found


def build(blocks: bool) -> Any:
    """A model that trains whole, or one whose head does."""
    set_seed(0)
    if blocks:
        shape = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 1536}
        return BertForSequenceClassification(BertConfig(**shape, vocab_size=VOCABULARY))
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = BertForSequenceClassification(BertConfig(**shape, vocab_size=VOCABULARY, num_labels=CLASSES))
    return get_peft_model(base, AFLoRAConfig(r=4, task_type="SEQ_CLS"))


def main(arguments: list[str] | None = None) -> None:
    gc.collect()
    ground = memory("VmRSS")
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **({"cpu": True} if fsdp else {})
    )
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // accelerator.num_processes
        plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = 1_000_000
    blocks = bool(sys.argv[1:] if arguments is None else arguments)
    model, never = build(blocks), FreezingConfig(total_steps=1000, initial_steps=900, final_steps=10)
    if blocks:
        never = replace(never, granularity="matrix", unit="block")
        transfer.CHUNK_BYTES = 2**20  # small beside this model, as 64 MiB are beside those that people train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    trained = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
    model, optimizer = accelerator.prepare(model, optimizer)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, never)
    share = GLOBAL_BATCH // accelerator.num_processes

    def step(number: int) -> None:
        batch = {k: v[accelerator.process_index * share :][:share] for k, v in global_batch(number).items()}
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    for number in range(2):
        step(number)
    gc.collect()
    reset_peak()
    for number in range(2, 5):  # how much of a step is alive at once depends on when threads come to their turn
        step(number)
    step_peak = memory("VmHWM") - ground
    engine, names = freezing.engine, freezing.freezable
    before = owners(engine)
    with Traffic() as drop:
        engine.drop([])
    nothing = drop.bytes
    settle()
    reset_peak()
    with Traffic() as freeze:
        freezing.freeze([n for n in names if int(n.split(".layer.")[1].split(".")[0]) < 4] if blocks else names[2:4])
    freeze_peak = memory("VmHWM") - ground
    after = owners(engine)
    moved = {name: int((after[name] != before[name]).sum()) for name in after}
    step(5)
    found = {
        "kind": engine.kind,
        "drop of nothing": nothing,
        "freeze": freeze.bytes,
        "moved": sum(moved.values()),
        "moved of matrices": sum(moved[name] for name in freezing.remaining),
        "step peak": step_peak,
        "freeze peak": freeze_peak,
        "bytes": 4 * trained,
    }
    print(f"\nHEAVY {json.dumps(found)}\n", end="", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
