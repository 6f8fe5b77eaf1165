"""The main job against transformers' Trainer with methods of PEFT: examples and tokens per second, padding.

    python -m profiling.throughput                                                # the reviews, 1 and 2 ranks
    python -m profiling.throughput --tasks demo rte --glue ../shared/glue --ranks 2 --rounds 3

Every run is a training of its own, started through `accelerate launch`; rounds take all of them in turn. All have the
same data, encoder, adapted layers, trained head, dtype, global batch and threads, and the same clock: from one
optimizer update to another, the first ones left out. Nobody logs, saves or evaluates meanwhile.

Trainer has its defaults, dynamic padding, and find_unused_parameters off, which PEFT's models do not need. Its updates
are some of a whole epoch's global batches as its own sampler makes them, even in size: the sampler that groups by
length makes batches of very different sizes. The main job draws its batches at random, and passes through the whole
freezing schedule in the measured updates.

Writes throughput.json, throughput.md and throughput.png to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .trainings import MAIN_JOB, Training

METHODS = {"lora": "LoRA r=8", "vera": "VeRA r=256", "adalora": "AdaLoRA"}
SAMPLINGS = ("random", "group_by_length")
RUNS = (MAIN_JOB, *(f"{method}/{sampling}" for method in METHODS for sampling in SAMPLINGS))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiling.throughput", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["demo"], help="demo (the reviews), or tasks of GLUE")
    parser.add_argument("--glue", help="folder of GLUE's TSV files; the hub if not given")
    parser.add_argument("--model", default="demo", help="a hub id, a folder, or demo")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=16, help="measured optimizer updates of each run")
    parser.add_argument("--warmup", type=int, default=3, help="updates before measuring, at least 1")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per update, over all ranks")
    parser.add_argument("--max-length", type=int, default=256, help="tokens after which texts are cut")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error("--warmup: the clock starts at the end of an update, so one at least has to come before")
    for ranks in args.ranks:
        if args.batch_size % ranks:
            parser.error(f"--batch-size {args.batch_size} is no multiple of {ranks} ranks, which Trainer needs")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return what throughput.json holds."""
    args = arguments(argv)
    measured: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    for number in range(args.rounds):
        for task in args.tasks:
            for ranks in args.ranks:
                for run in args.runs:
                    training = Training(
                        run=run,
                        task=task,
                        glue=args.glue,
                        model=args.model,
                        updates=args.updates,
                        warmup=args.warmup,
                        batch_size=args.batch_size,
                        max_length=args.max_length,
                        dtype=args.dtype,
                        seed=number,
                    )
                    which = {"task": task, "ranks": ranks, "run": run, "round": number}
                    measured.append(which | launch(training, ranks))
                    print(json.dumps(measured[-1]), flush=True)
        report = write(measured, args)  # after each round: what is interrupted later is not lost
    print((args.out / "throughput.md").read_text())
    return report


def write(measured: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"setting": setting(args), "rows": summary(measured), "rounds": measured}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "throughput.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "throughput.md").write_text(markdown(report))
    figure(report["rows"], args.out / "throughput.png")
    return report


def launch(training: Training, ranks: int) -> dict[str, float]:
    """Start one training and return what `rates` makes of it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = ["--multi_gpu"] if ranks > 1 else []
    launcher += ["--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", str(port)]
    launcher += ["--mixed_precision", "bf16" if training.dtype == "bf16" else "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1))}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "profiling.trainings", name]
        done = subprocess.run(
            [*command, json.dumps(asdict(training))], env=environment, capture_output=True, text=True, check=False
        )
        seen = [json.loads(path.read_text()) for path in sorted(Path(name).glob("rank*.json"))]
    # gloo may abort an interpreter that ends; a rank that has written has done its work.
    if len(seen) < ranks:
        raise SystemExit(f"{training.run} on {training.task}, {ranks} ranks, failed:\n{done.stderr[-3000:]}")
    return rates(seen, training)


def rates(ranks: list[list[list[float]]], training: Training) -> dict[str, float]:
    """What the measured updates come to, from each rank's [end, examples, real tokens, computed tokens] of each."""
    assert {len(updates) for updates in ranks} == {training.total}, "not every update was seen on every rank"
    seconds = max(updates[-1][0] - updates[training.warmup - 1][0] for updates in ranks)
    columns = zip(*(update[1:] for updates in ranks for update in updates[training.warmup :]), strict=True)
    examples, real, computed = (sum(column) for column in columns)
    return {
        "seconds": seconds,
        "examples": examples,
        "real_tokens": real,
        "computed_tokens": computed,
        "examples_per_second": examples / seconds,
        "tokens_per_second": real / seconds,
        "padding": 1 - real / computed,
    }


def summary(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task, number of ranks and run: medians over the rounds, and how the main job compares.

    The ratio is the median of the rounds' ratios: what slows a whole round down does not change it.
    """
    rates_of = {(m["task"], m["ranks"], m["run"], m["round"]): m for m in measured}
    rows = []
    for task, ranks, run in dict.fromkeys((m["task"], m["ranks"], m["run"]) for m in measured):
        rounds = [m for m in measured if (m["task"], m["ranks"], m["run"]) == (task, ranks, run)]
        speeds = [m["examples_per_second"] for m in rounds]
        row = {"task": task, "ranks": ranks, "run": run, "low": min(speeds), "high": max(speeds)}
        for key in ("examples_per_second", "tokens_per_second", "padding"):
            row[key] = statistics.median(m[key] for m in rounds)
        ours = [rates_of.get((task, ranks, MAIN_JOB, m["round"])) for m in rounds]
        ratios = [o["examples_per_second"] / m["examples_per_second"] for o, m in zip(ours, rounds, strict=True) if o]
        row["main_job_over_it"] = statistics.median(ratios) if ratios else None
        rows.append(row)
    return rows


def setting(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    names = ("model", "batch_size", "max_length", "dtype", "updates", "warmup", "rounds")
    known: dict[str, Any] = {name: getattr(args, name) for name in names}
    return known | {"device": device, "cores": os.cpu_count(), "torch": torch.__version__}


def label(run: str) -> str:
    method, _, sampling = run.partition("/")
    return f"Trainer, {METHODS[method]}, {sampling}" if sampling else f"{MAIN_JOB} (AFLoRA r=4)"


def markdown(report: dict[str, Any]) -> str:
    lines = [
        ", ".join(f"{key} {value}" for key, value in report["setting"].items()),
        "",
        "| task | ranks | run | examples/s (lowest to highest) | main job over it | real tokens/s | padding |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        ratio = "-" if r["main_job_over_it"] is None else f"{r['main_job_over_it']:.2f}"
        lines.append(
            f"| {r['task']} | {r['ranks']} | {label(r['run'])} | {r['examples_per_second']:.1f} ({r['low']:.1f} to "
            f"{r['high']:.1f}) | {ratio} | {r['tokens_per_second']:,.0f} | {r['padding']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Examples per second, a panel for each task and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r["task"], r["ranks"]) for r in rows))
    drawn, axes = plt.subplots(
        1, len(panels), figsize=(3.2 + 3 * len(panels), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (task, ranks) in zip(axes[0], panels, strict=True):
        shown = [r for r in rows if (r["task"], r["ranks"]) == (task, ranks)]
        for place, r in enumerate(shown):
            value = r["examples_per_second"]
            axis.barh(place, value, 0.7, color="#1f5a96" if r["run"] == MAIN_JOB else "#c9a227")
            axis.plot([r["low"], r["high"]], [place, place], color="#333333", linewidth=1)
            axis.text(r["high"], place, f" {value:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(shown)), [label(r["run"]) for r in shown], fontsize=8)
        axis.set_title(f"{task}, {ranks} rank{'s' if ranks > 1 else ''}", fontsize=10)
        axis.set_xlabel("examples per second")
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


if __name__ == "__main__":
    main()
