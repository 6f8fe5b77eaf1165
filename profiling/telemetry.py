"""What telemetry costs a training: blocks of steps with and without it, in turn, in one process.

    python -m profiling.telemetry

A block is the ten updates between two lines of metrics.jsonl; "with" ends in what a line costs: the scores of
all matrices and the optimizer's bytes, asked for and written to TensorBoard with the scalars.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from aflora_dist.processes import launched_accelerator
from aflora_dist.watch.telemetry import Telemetry
from aflora_dist.watch.tensorboard import TensorBoard

from .methods import create
from .models import SHAPES, build
from .schedule import learnable_batch


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print and return the ratio of medians, and the milliseconds of a line and of Fig. 5."""
    parser = argparse.ArgumentParser(prog="python -m profiling.telemetry", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deberta-v3-base", help=f"{', '.join(SHAPES)}, a hub id, or a folder")
    parser.add_argument("--layers", type=int, default=3, help="keep only so many layers of a built-in shape")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=12, help="measured blocks of each kind")
    args = parser.parse_args(argv)
    accelerator = launched_accelerator()
    base: Any = build(args.model, args.layers).to(accelerator.device)
    method = create("aflora_training", base, accelerator)
    freezing = method.freezing
    assert freezing is not None
    batch = learnable_batch(base.config.vocab_size, args.batch, args.length, accelerator.device)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    lines, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(TensorBoard(Path(folder), first_step=0))
        for number in tqdm(range(args.blocks + 1), desc="blocks"):
            for kind in random.sample(list(seconds), 2):
                began = time.perf_counter()
                for _ in range(10):
                    method.step(batch, accelerator)
                if kind == "with":
                    ended = time.perf_counter()
                    scores, state = freezing.scores(), freezing.optimizer_state_bytes()
                    telemetry.scalars({f"train/{i}": float(state + i) for i in range(12)}, number)
                    telemetry.scores(scores, number)
                    lines.append(time.perf_counter() - ended)
                if number:  # the first warms up
                    seconds[kind].append(time.perf_counter() - began)
            began = time.perf_counter()
            telemetry.freeze_map(freezing.freezable, {}, 100, number)
            figures.append(time.perf_counter() - began)
        telemetry.close()
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    result = {
        "ratio": medians["with"] / medians["without"],
        "step_ms": medians["without"] * 100,
        "line_ms": statistics.median(lines) * 1e3,
        "share": statistics.median(lines) / medians["without"],
        "figure_ms": statistics.median(figures) * 1e3,
    }
    print("| step, ms | with over without telemetry | a line, ms | of ten steps | Fig. 5 (at evaluations), ms |")
    print("|---|---|---|---|---|")
    print(
        f"| {result['step_ms']:.1f} | {result['ratio']:.3f} | {result['line_ms']:.2f} | {result['share']:.2%} "
        f"| {result['figure_ms']:.0f} |"
    )
    return result


if __name__ == "__main__":
    main()
