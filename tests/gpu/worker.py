"""tests/workers/tiny.py's model on whatever device and engine the launcher asks for: NCCL on GPUs, gloo on CPUs.

python -m tests.gpu.worker OUT [--half] [--overflow T]; the main process writes what it saw to OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aflora_dist import AdaptiveFreezing, FreezingConfig
from aflora_dist.processes import launched_accelerator
from aflora_dist.processes.cpu_group import cpu_group
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch

STEPS = 14


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", action="store_true", help="fp16, scaled losses")
    parser.add_argument("--overflow", type=int, help="the batch whose loss is infinite")
    args = parser.parse_args(arguments)
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if args.half and sharded:
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed asks for fast fp16; slow fp16 computes the same.
        get_accelerator().is_fp16_supported = lambda: True
        get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16]
    precision = "fp16" if args.half and not sharded else "no"
    accelerator = launched_accelerator(mixed_precision=precision, step_scheduler_with_optimizer=False)
    share = GLOBAL_BATCH // accelerator.num_processes
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": share, "gradient_clipping": 0.0}
        if args.half:
            plugin.deepspeed_config["fp16"] = {"enabled": True, "initial_scale_power": 12}
    model = build_model()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
    config = FreezingConfig(total_steps=STEPS, initial_steps=2, final_steps=3)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    steps, losses, scores, peaks, reserved = [], [], [], [], []
    model.train()
    for number in range(STEPS):
        mine = {k: v[accelerator.process_index * share :][:share] for k, v in global_batch(number).items()}
        loss = model(**{k: v.to(accelerator.device) for k, v in mine.items()}).loss
        accelerator.backward(loss * (float("inf") if number == args.overflow else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        steps.append(freezing.step)
        losses.append(accelerator.reduce(loss.detach().float(), "mean").item())
        scores.append(freezing.scores())
        if accelerator.device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
            reserved.append(torch.cuda.memory_reserved())
    model.eval()
    batch = {k: v.to(accelerator.device) for k, v in global_batch(0).items()}

    def loss_now() -> float:
        with torch.no_grad():
            return model(**batch).loss.float().item()

    restored = [loss_now()]
    tensors, record = freezing.progress.snapshot()
    noise = {key: torch.rand_like(t) if key.startswith("value/") else t for key, t in tensors.items()}
    for whole in (noise, tensors):
        freezing.progress.restore(whole, record)
        restored.append(loss_now())
    beside = cpu_group()
    if accelerator.is_main_process:
        found: dict[str, Any] = {
            "kind": freezing.engine.kind,
            "device": accelerator.device.type,
            "backend": dist.get_backend() if dist.is_initialized() else None,
            "steps": steps,
            "losses": losses,
            "scores": scores,
            "skipped": freezing.progress.skipped,
            "ranks": accelerator.num_processes,
            "peaks": peaks,
            "reserved": reserved,
            "restored": restored,
            "cpu_group": None if beside is None else dist.get_backend(beside),
            "events": [[e.step, e.frozen, e.scores] for e in freezing.events],
        }
        args.out.write_text(json.dumps(found))
    accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort as Python ends, after all is written


if __name__ == "__main__":
    main()
