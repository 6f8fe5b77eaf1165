"""The paper's schedule step by step on a model's real shape: what trains on average, and what freezing costs.

    python -m profiling.schedule                                                       # 1,140 updates
    accelerate launch --config_file launch/zero2.yaml -m profiling.schedule --batch 1  # any engine

The model's weights are random and so are its few tokens, the freezing is real: every update is observed,
every decision ranks real scores, every freeze rebuilds the optimizer. Small batches keep it short and make
freezing's share of the time an upper bound, for its cost does not depend on the batch.

Writes freeze_log.jsonl, memory.json (CUDA), schedule.json and schedule.md to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezeEvent, FreezingConfig
from aflora_dist.adapter.architectures import target_modules
from aflora_dist.processes import launched_accelerator

from .methods import shared_copy
from .models import SHAPES, build


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the schedule and return what schedule.json holds."""
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
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    accelerator = launched_accelerator()
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch
    torch.manual_seed(0)
    base: Any = build(args.model, args.layers)
    targets = target_modules(base.config.model_type)
    lora = trainable(get_peft_model(shared_copy(base), LoraConfig(r=8, target_modules=targets)))
    model = get_peft_model(base, AFLoRAConfig(r=4, target_modules=targets)).train()
    total = args.epochs * args.steps_per_epoch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    model, optimizer = accelerator.prepare(model, optimizer)
    log: list[FreezeEvent] = []
    freezing = AdaptiveFreezing(
        accelerator,
        model,
        optimizer,
        FreezingConfig(
            total_steps=total,
            initial_steps=round(args.initial_epochs * args.steps_per_epoch),
            final_steps=round(args.final_epochs * args.steps_per_epoch),
        ),
        on_freeze=log.append,
    )
    steps, trained, memory = [], 0, []
    torch.manual_seed(1 + accelerator.process_index)
    for step in tqdm(range(total), disable=not accelerator.is_main_process, desc="schedule"):
        batch = learnable_batch(base.config.vocab_size, args.batch, args.length, accelerator.device)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trained += freezing.trainable_params
        began, events = time.perf_counter(), len(log)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
            if len(log) > events or step == 0:  # the peaks of steps without a rebuild tell what training needs
                memory.append({"step": step, "allocated": torch.cuda.memory_allocated(), "remaining": None})
            memory[-1] |= {"peak": torch.cuda.max_memory_allocated(), "remaining": len(freezing.remaining)}
        steps.append(time.perf_counter() - began)

    train = sum(steps)
    rebuilding = sum(event.rebuild_seconds for event in log)
    report = {
        "model": args.model,
        "engine": freezing.engine.kind,
        "ranks": accelerator.num_processes,
        "tokens_per_rank_and_step": args.batch * args.length,
        "steps": total,
        "matrices": len(freezing.freezable),
        "events": len(log),
        "trainable_params_start": freezing.trainable_params + sum(freezing.numels[n] for e in log for n in e.frozen),
        "trainable_params_average": trained / total,
        "trainable_params_lora_r8": lora,
        "step_seconds_median": statistics.median(steps),
        "train_seconds": train,
        "observe_seconds_per_step": (freezing.seconds - rebuilding) / total,
        "rebuild_seconds_median": statistics.median(event.rebuild_seconds for event in log),
        "rebuild_seconds_total": rebuilding,
    }
    if accelerator.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "freeze_log.jsonl").open("w") as file:
            file.writelines(json.dumps(asdict(event)) + "\n" for event in log)
        if memory:
            (args.out / "memory.json").write_text(json.dumps(memory, indent=1) + "\n")
        (args.out / "schedule.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "schedule.md").write_text(markdown(report, memory))
        print((args.out / "schedule.md").read_text())
    accelerator.end_training()
    return report


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
