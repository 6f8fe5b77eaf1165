"""The paper's schedule step by step on a model's real shape: what trains on average, and what freezing costs.

    python -m profiling.schedule                                                       # 1,140 updates
    accelerate launch --config_file launch/zero2.yaml -m profiling.schedule --batch 1  # any engine
    python -m profiling.schedule speed      # seconds of a step with and without freezing: see profiling/speed.py

The model's weights are random and so are its few tokens, the freezing is real: every update is observed,
every decision ranks real scores, every freeze rebuilds the optimizer. Small batches keep it short and make
freezing's share of the time an upper bound, for its cost does not depend on the batch.

Writes freeze_log.jsonl, memory.json (CUDA), schedule.json and schedule.md to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezeEvent, FreezingConfig
from aflora_dist.adapter.architectures import target_modules
from aflora_dist.processes import launched_accelerator

from . import speed
from .methods import shared_copy
from .models import SHAPES, build


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the schedule and return what schedule.json holds; with "speed" first, what speed.json does."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["speed"]:
        return speed.main(given[1:])
    parser = argparse.ArgumentParser(prog="python -m profiling.schedule", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deberta-v3-base", help=f"{', '.join(SHAPES)}, a hub id, or a folder")
    parser.add_argument("--layers", type=int, help="keep only so many layers of a built-in shape")
    parser.add_argument("--batch", type=int, default=2, help="examples per rank and step")
    parser.add_argument("--length", type=int, default=8, help="tokens per example")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--initial-epochs", type=float, default=1.0, help="t_i")
    parser.add_argument("--final-epochs", type=float, default=14.0, help="t_f")
    parser.add_argument("--steps-per-epoch", type=int, default=57, help="57: MRPC in batches of 64")
    parser.add_argument("--out", type=Path, default=Path("runs/schedule"))
    args = parser.parse_args(given)

    accelerator = launched_accelerator()
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch
    torch.manual_seed(0)
    base: Any = build(args.model, args.layers)
    targets = target_modules(base)
    lora = trainable(get_peft_model(shared_copy(base), LoraConfig(r=8, target_modules=targets)))
    model = get_peft_model(base, AFLoRAConfig(r=4, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    config = FreezingConfig(
        total_steps=args.epochs * args.steps_per_epoch,
        initial_steps=round(args.initial_epochs * args.steps_per_epoch),
        final_steps=round(args.final_epochs * args.steps_per_epoch),
    )
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    at_start = freezing.trainable_params
    torch.manual_seed(1 + accelerator.process_index)
    steps = train(accelerator, model, optimizer, freezing, base.config.vocab_size, args.batch, args.length)
    seconds = [step.seconds for step in steps]
    rebuilds = [event.rebuild_seconds for event in freezing.events]
    report = {
        "model": args.model,
        "engine": freezing.engine.kind,
        "ranks": accelerator.num_processes,
        "tokens_per_rank_and_step": args.batch * args.length,
        "steps": len(steps),
        "matrices": len(freezing.freezable),
        "events": len(freezing.events),
        "trainable_params_start": at_start,
        "trainable_params_average": sum(step.trained for step in steps) / len(steps),
        "trainable_params_lora_r8": lora,
        "step_seconds_median": statistics.median(seconds),
        "train_seconds": sum(seconds),
        "observe_seconds_per_step": (freezing.seconds - sum(rebuilds)) / len(steps),
        "rebuild_seconds_median": statistics.median(rebuilds),
        "rebuild_seconds_total": sum(rebuilds),
    }
    if accelerator.is_main_process:
        write(args.out, report, freezing.events, steps if torch.cuda.is_available() else [])
    accelerator.end_training()
    return report


@dataclass(frozen=True)
class Step:
    """One update.

    Attributes:
        trained: Elements that it updated.
        remaining: Freezable matrices that train after it.
        allocated, peak: Bytes on the GPU, after it and at most during it; 0 without a GPU.
    """

    seconds: float
    trained: int
    remaining: int
    allocated: int = 0
    peak: int = 0


def train(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    freezing: AdaptiveFreezing,
    *inputs: int,
) -> list[Step]:
    """All updates of the schedule. `inputs`: size of the vocabulary, examples per rank, tokens per example."""
    total = freezing.config.total_steps
    scheduler = torch.optim.lr_scheduler.LinearLR(freezing.engine.optimizer, 1.0, 0.0, total)
    on_gpu = torch.cuda.is_available()
    steps = []
    for _ in tqdm(range(total), disable=not accelerator.is_main_process, desc="schedule"):
        batch = learnable_batch(*inputs, accelerator.device)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trained, began = freezing.trainable_params, time.perf_counter()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        memory = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if on_gpu else (0, 0)
        steps.append(Step(seconds, trained, len(freezing.remaining), *memory))
    return steps


def write(out: Path, report: dict[str, Any], events: Sequence[FreezeEvent], on_gpu: Sequence[Step]) -> None:
    """The files of this measurement; `on_gpu` is empty without a GPU."""
    starts = [0, *(event.step for event in events)]
    phases = [(n, on_gpu[n:end]) for n, end in zip(starts, [*starts[1:], len(on_gpu)], strict=True)]
    memory = [  # the lowest peak: a rebuild is in the first update only, and not what training needs
        {"step": n, "remaining": p[-1].remaining, "allocated": p[-1].allocated, "peak": min(s.peak for s in p)}
        for n, p in phases
        if p
    ]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "freeze_log.jsonl").open("w") as file:
        file.writelines(json.dumps(asdict(event)) + "\n" for event in events)
    if memory:
        (out / "memory.json").write_text(json.dumps(memory, indent=1) + "\n")
    (out / "schedule.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "schedule.md").write_text(text := markdown(report, memory))
    print(text)


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def learnable_batch(vocabulary: int, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens; the label is whether most are in the vocabulary's upper half."""
    tokens = torch.randint(1, vocabulary, (batch, length))
    labels = (tokens.float().mean(dim=1) > vocabulary / 2).long()
    return {
        key: value.to(device)
        for key, value in {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}.items()
    }


def markdown(r: dict[str, Any], memory: list[dict[str, Any]]) -> str:
    observe, rebuild = r["observe_seconds_per_step"] * r["steps"], r["rebuild_seconds_total"]
    lines = [
        "| engine, ranks | steps | events | trainable on average | LoRA r=8 over it | step, ms "
        "| observe, ms | of the time | rebuild, ms | all rebuilds, of the time |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| {r['engine']}, {r['ranks']} | {r['steps']:,} | {r['events']} | {r['trainable_params_average']:,.0f} "
        f"| {r['trainable_params_lora_r8'] / r['trainable_params_average']:.2f} | {r['step_seconds_median'] * 1e3:.1f} "
        f"| {r['observe_seconds_per_step'] * 1e3:.2f} | {observe / r['train_seconds']:.2%} "
        f"| {r['rebuild_seconds_median'] * 1e3:.1f} | {rebuild / r['train_seconds']:.2%} |",
    ]
    if memory:
        lines += ["", "| after step | matrices training | allocated, MB | peak of the steps that follow, MB |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {m['step']} | {m['remaining']} | {m['allocated'] / 1e6:.2f} | {m['peak'] / 1e6:.1f} |" for m in memory
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
