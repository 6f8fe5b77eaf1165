"""What freezing itself costs, per engine: observing a step, a decision, a drop, bytes communicated.

    python -m profiling.overhead           # DDP, ZeRO-1/2/3 and FSDP2, 1, 2 and 4 processes on this machine

Writes overhead.json, overhead.md and overhead.png to --out. Processes are started through `accelerate
launch`; the model is small and its matrices many, for the cost of interest grows with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .traffic import Traffic

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer"}
FSDP |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
MATRICES_PER_LAYER = 4  # BERT: A and B of two feed-forward layers


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every combination and write the report; with --worker, be one process of one combination."""
    parser = argparse.ArgumentParser(prog="python -m profiling.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--matrices", nargs="+", type=int, default=[24, 96, 448])
    parser.add_argument("--hidden", type=int, default=64, help="size of the model's layers")
    parser.add_argument("--steps", type=int, default=10, help="observed steps")
    parser.add_argument("--rebuilds", type=int, default=4, help="measured decisions and drops")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        work(args)
        return []
    rows: list[dict[str, Any]] = []
    for engine in args.engines:
        for ranks in args.ranks:
            if (engine == "single") == (ranks == 1):
                rows += launch(engine, ranks, args)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"rows": rows}
    (args.out / "overhead.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "overhead.md").write_text(markdown(report))
    figure(rows, args.out / "overhead.png")
    print((args.out / "overhead.md").read_text())
    return rows


def launch(engine: str, ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    sharded = ["--use_deepspeed", "--zero_stage", engine[-1]]
    kind = {"single": [], "ddp": ["--multi_gpu"], "fsdp2": ["--multi_gpu"]}.get(engine, sharded)
    on_cpu = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" and not torch.cuda.is_available() else []
    launcher = [*kind, "--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "-m", *on_cpu, "profiling.overhead", "--worker", str(out)]
        for name in ("hidden", "steps", "rebuilds"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--matrices", *map(str, args.matrices)]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(FSDP if engine == "fsdp2" else {})},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{engine} on {ranks} ranks failed:\n{done.stderr[-2000:]}")
        rows = json.loads(out.read_text())
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def work(args: argparse.Namespace) -> None:
    """One process: the costs for each number of matrices."""
    from peft import get_peft_model
    from transformers import BertConfig, BertModel

    from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
    from aflora_dist.processes import launched_accelerator

    rows = []
    for matrices in args.matrices:
        accelerator = launched_accelerator()
        if accelerator.state.deepspeed_plugin is not None:
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        torch.manual_seed(0)
        layers = matrices // MATRICES_PER_LAYER
        size = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_attention_heads": 4}
        base = BertModel(BertConfig(num_hidden_layers=layers, vocab_size=100, **size), add_pooling_layer=False)
        model = get_peft_model(base, AFLoRAConfig(r=4))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model, optimizer = accelerator.prepare(model, optimizer)
        never = FreezingConfig(total_steps=10**9, initial_steps=10**9 - 1, final_steps=0)
        freezing = AdaptiveFreezing(accelerator, model, optimizer, never)
        tokens = torch.randint(1, 100, (2, 16), device=accelerator.device)
        steps = []
        for _ in range(2 + args.steps):
            began = time.perf_counter()
            accelerator.backward(model(input_ids=tokens).last_hidden_state.square().mean())
            optimizer.step()
            optimizer.zero_grad()
            steps.append(time.perf_counter() - began)
        observe, count = freezing.seconds, freezing.step
        decisions, rebuilds, traffic = zip(*(freeze_one(freezing) for _ in range(args.rebuilds)), strict=True)
        rows.append(
            {
                "engine": freezing.engine.kind,
                "ranks": accelerator.num_processes,
                "matrices": matrices,
                "elements": sum(freezing.numels.values()),
                "step_seconds": statistics.median(steps[2:]),
                "observe_seconds": observe / count,
                "decision_seconds": statistics.median(decisions),
                "rebuild_seconds": statistics.median(rebuilds),
                "decision_bytes": max(decided for decided, _ in traffic),
                "rebuild_bytes": max(moved for _, moved in traffic),
            }
        )
        freezing.interrupted()  # it was never meant to reach its last step
        freezing.detach()
        accelerator.free_memory()
    if int(os.environ.get("RANK", "0")) == 0:
        args.worker.write_text(json.dumps(rows))
    accelerator.end_training()


def freeze_one(freezing: Any) -> tuple[float, float, tuple[int, int]]:
    """Seconds of a decision and of a drop, and the bytes of each."""
    with Traffic() as decided:
        freezing.engine.agree(str(freezing.scores()), "disagree")
    decision = timed(lambda: freezing.engine.agree(str(freezing.scores()), "disagree"))
    with Traffic() as moved:  # what a freeze does, without the line for the log
        freezing._drop(freezing._scores.names[:1])
    rebuild = timed(lambda: freezing._drop(freezing._scores.names[:1]))
    return decision, rebuild, (decided.bytes, moved.bytes)


def timed(call: Callable[[], Any]) -> float:
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| engine | ranks | matrices | step, ms | observe, ms | of the step | decide, ms | drop, ms | of a step "
        "| decision, bytes | drop, bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        lines.append(
            f"| {r['engine']} | {r['ranks']} | {r['matrices']} | {r['step_seconds'] * 1e3:.1f} "
            f"| {r['observe_seconds'] * 1e3:.2f} | {r['observe_seconds'] / r['step_seconds']:.2%} "
            f"| {r['decision_seconds'] * 1e3:.1f} | {r['rebuild_seconds'] * 1e3:.1f} "
            f"| {r['rebuild_seconds'] / r['step_seconds']:.0%} | {r['decision_bytes']:,} | {r['rebuild_bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """How each cost grows with the number of matrices, a line per engine and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, key in zip(axes, ("observe", "decision", "rebuild"), strict=True):
        for engine, ranks in dict.fromkeys((r["engine"], r["ranks"]) for r in rows):
            line = [r for r in rows if (r["engine"], r["ranks"]) == (engine, ranks)]
            label = f"{engine}, {ranks} rank{'s' if ranks > 1 else ''}"
            axis.plot([r["matrices"] for r in line], [r[f"{key}_seconds"] * 1e3 for r in line], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="freezable matrices", title="drop" if key == "rebuild" else key)
        axis.set_xticks(sorted({r["matrices"] for r in rows}), sorted({r["matrices"] for r in rows}))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds")
    axes[2].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


if __name__ == "__main__":
    main()
