"""A training that becomes faster as it goes: seconds of a step through a whole schedule, with and without freezing.

    python -m profiling.schedule speed          # the reviews, the demo's encoder

All train in one process, on the same batches: of each update every variant takes its step, in another order each time.
Where blocks freeze whole, from the bottom on (`freezing.prefix`), the backward pass ends above them. Beside the clock
stand the bytes that a step keeps for its backward pass and those of the optimizer, and what `aflora plan` says of the
latter before anything trains. What freezing so costs in accuracy, `aflora reproduce beyond` says.

Writes speed.json, speed.md and speed.png to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from aflora_dist.control import AdaptiveFreezing, Progress
from aflora_dist.engines import create_engine
from aflora_dist.methods.choose import create_method
from aflora_dist.options import Config
from aflora_dist.plan.layout import FLOAT32
from aflora_dist.plan.model import PlannedModel
from aflora_dist.tasks.data import load_data
from aflora_dist.tasks.model import load_base
from aflora_dist.tasks.tokens import tokenized
from aflora_dist.training.build import create_optimizer
from aflora_dist.training.command_line import parse

from .compare import saved_bytes
from .methods import Method, shared_copy

_BLOCKS = {"freezing.unit": "block", "freezing.score": "front_to_back", "freezing.prefix": True}
# Name -> the method, whether it freezes, and options of the main job.
VARIANTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "AFLoRA, never": ("aflora", False, {"adapter.freezing": "never"}),
    "AFLoRA": ("aflora", True, {}),
    "AFLoRA, prefix": ("aflora", True, _BLOCKS),
    "LoRA": ("lora", False, {}),
    "LoRA, matrices": ("lora", True, {}),
    "LoRA, blocks": ("lora", True, _BLOCKS),
    "full": ("full", False, {}),
    "full, blocks": ("full", True, _BLOCKS),
}
# What each is measured by: the same method without any freezing, and without the prefix.
AGAINST = {
    "AFLoRA": ["AFLoRA, never"],
    "AFLoRA, prefix": ["AFLoRA, never", "AFLoRA"],
    "LoRA, matrices": ["LoRA"],
    "LoRA, blocks": ["LoRA"],
    "full, blocks": ["full"],
}
RATES = {"aflora": (4e-3, 4e-3), "lora": (1e-3, 1e-3), "full": (1e-4, 1e-3)}  # of the method, of the head


@dataclass
class Variant:
    """One of them as it trains.

    Attributes:
        planned: Bytes of the optimizer after each freeze, by step, as `aflora plan` has them.
        seconds, moments: Of each update, and the optimizer's bytes after it.
        saved: Bytes kept for the backward pass, by the step before which they were counted.
    """

    method: Method
    progress: Progress
    planned: dict[int, float]
    seconds: list[float] = field(default_factory=list)
    moments: list[int] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m profiling.schedule speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--model", default="demo", help="a hub id, a folder, or demo")
    parser.add_argument("--steps", type=int, default=80, help="T, the updates of the whole schedule")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per update")
    parser.add_argument("--max-length", type=int, default=128, help="tokens after which texts are cut")
    parser.add_argument("--initial", type=float, default=0.1, help="t_i, of the training")
    parser.add_argument("--final", type=float, default=0.2, help="t_f, of the training")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    args = parser.parse_args(argv)
    wanted = {*args.variants, *(other for name in args.variants for other in AGAINST.get(name, []))}
    args.variants = [name for name in VARIANTS if name in wanted]
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, write the report, and return what speed.json holds."""
    args = arguments(argv)
    report: dict[str, Any] = {"steps": args.steps, "variants": measure(args)}
    report["ratios"] = {
        name: {other: ratios(report["variants"], name, other) for other in others}
        for name, others in AGAINST.items()
        if name in args.variants
    }
    write(report, args.out)
    print((args.out / "speed.md").read_text())
    return report


def configured(name: str, args: argparse.Namespace, folder: Path) -> Config:
    """The main job's configuration of a variant, of one epoch of `--steps` updates."""
    method, freezes, options = VARIANTS[name]
    chosen = {
        "run.dir": folder / "run",
        "run.save_every": 0,
        "run.tensorboard": False,
        "model.name": args.model,
        "method.name": method,
        "data.max_length": args.max_length,
        "data.max_train_examples": args.steps * args.batch_size,
        "train.epochs": 1,
        "train.batch_size": args.batch_size,
        "train.learning_rate": RATES[method][0],
        "train.head_learning_rate": RATES[method][1],
        **options,
    }
    if freezes:
        chosen |= {"freezing.enabled": True, "freezing.initial_epochs": args.initial}
        chosen |= {"freezing.final_epochs": args.final}
    return parse([part for key, value in chosen.items() for part in (f"--{key}", str(value))])[0]


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        first = configured(args.variants[0], args, Path(name))
        data = load_data(first.data, first.train.seed)
        if (most := len(data.train) // args.batch_size) < args.steps:
            raise SystemExit(
                f"--steps {args.steps} of --batch-size {args.batch_size} take more than the {len(data.train):,} "
                f"examples there are for training, of which none comes twice: --steps {most} at most."
            )
        base, tokenizer, head = load_base(first.model, data.labels)
        examples = tokenized(data.train, tokenizer, args.max_length, "the training split")
        variants = {each: prepared(configured(each, args, Path(name)), base, head, args) for each in args.variants}
    order, collate = random.Random(0), DataCollatorWithPadding(tokenizer)
    chosen = order.sample(range(len(examples)), args.steps * args.batch_size)
    accelerator = Accelerator()
    for step in tqdm(range(args.steps), desc="steps"):
        at = chosen[step * args.batch_size :][: args.batch_size]
        batch = collate([examples[i] for i in at])
        moved = {key: value.to(accelerator.device) for key, value in batch.items()}
        for variant in order.sample(list(variants.values()), len(variants)):
            take(variant, step, moved, accelerator)
    return {name: described(variant) for name, variant in variants.items()}


def prepared(config: Config, base: Any, head: list[str], args: argparse.Namespace) -> Variant:
    """As the main job sets it up."""
    set_seed(0)
    method = create_method(config)
    model = method.adapt(copy.deepcopy(base) if config.method.name == "full" else shared_copy(base), head)
    method.check(args.steps)
    plan = PlannedModel(config, method, model)
    bytes_each = plan.trained.moments * FLOAT32
    planned = {e.step: e.trainable.expected * bytes_each for e in plan.freezes.events} if plan.freezes else {}
    accelerator = Accelerator()
    optimizer = create_optimizer(config, model, method)
    ready, optimizer = accelerator.prepare(model.train(), optimizer)
    progress = Progress(create_engine(accelerator, ready, optimizer))
    control = method.attach(accelerator, ready, optimizer, progress, lambda event: None)
    freezing = control if isinstance(control, AdaptiveFreezing) else None
    return Variant(Method(config.method.name, ready, optimizer, [], freezing=freezing), progress, planned)


def take(variant: Variant, step: int, batch: dict[str, Tensor], accelerator: Accelerator) -> None:
    """One update."""
    method, on_gpu = variant.method, torch.cuda.is_available()
    froze = method.freezing.events[-1].step if method.freezing and method.freezing.events else None
    if step in (0, froze and froze + 1):
        variant.saved[step] = saved_bytes(method, batch, accelerator)
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    method.step(batch, variant.progress.engine.accelerator)
    if on_gpu:
        torch.cuda.synchronize()
    variant.seconds.append(time.perf_counter() - began)
    variant.moments.append(variant.progress.engine.moment_bytes())


def described(variant: Variant) -> dict[str, Any]:
    freezing = variant.method.freezing
    events = freezing.events if freezing else []
    said = {step: planned for step, planned in variant.planned.items() if step < len(variant.moments)}
    return {
        "seconds": variant.seconds,
        "moment_bytes": variant.moments,
        "saved_bytes": variant.saved,
        "planned_moment_bytes": said,
        "furthest_from_plan": max((abs(variant.moments[t] / b - 1) for t, b in said.items()), default=0.0),
        "backward_from": {event.step: event.backward_from for event in events},
        "freezing_seconds": freezing.seconds if freezing else 0.0,
    }


def ratios(variants: dict[str, Any], name: str, against: str) -> dict[str, float]:
    """How many times as fast as another one: in the last tenth of the updates, and in all."""
    mine, theirs = variants[name]["seconds"], variants[against]["seconds"]
    last = max(len(mine) // 10, 1)
    return {
        "last_tenth": statistics.median(theirs[-last:]) / statistics.median(mine[-last:]),
        "whole": sum(theirs) / sum(mine),
    }


def write(report: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "speed.md").write_text(markdown(report))
    picture(report).savefig(out / "speed.png", dpi=120)


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| | first tenth, ms | last tenth, ms | kept for backward, MB | optimizer, MB | furthest from its plan |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in report["variants"].items():
        tenth = max(len(found["seconds"]) // 10, 1)
        first, last = (statistics.median(part) * 1e3 for part in (found["seconds"][:tenth], found["seconds"][-tenth:]))
        saved, moments = list(found["saved_bytes"].values()), found["moment_bytes"]
        said = f"{found['furthest_from_plan']:.1%}" if found["planned_moment_bytes"] else ""
        lines.append(
            f"| {name} | {first:.0f} | {last:.0f} "
            f"| {saved[0] / 1e6:.1f} to {saved[-1] / 1e6:.1f} | {moments[0] / 1e6:.1f} to {moments[-1] / 1e6:.1f} "
            f"| {said} |"
        )
    lines += ["", "| | times as fast as | in the last tenth | in all |", "|---|---|---|---|"]
    for name, others in report["ratios"].items():
        for other, ratio in others.items():
            lines.append(f"| {name} | {other} | {ratio['last_tenth']:.2f} | {ratio['whole']:.2f} |")
    return "\n".join(lines) + "\n"


def picture(report: dict[str, Any]) -> Figure:
    """Seconds of a step, medians of five, and the bytes that it keeps for its backward pass."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    clock, kept = figure.subplots(1, 2)
    for name, found in report["variants"].items():
        seconds = found["seconds"]
        smooth = [statistics.median(seconds[max(t - 2, 0) : t + 3]) * 1e3 for t in range(len(seconds))]
        style = "--" if not VARIANTS[name][1] else "-"
        clock.plot(smooth, style, label=name, linewidth=1.2)
        steps = [int(step) for step in found["saved_bytes"]]
        sizes = [size / 1e6 for size in found["saved_bytes"].values()]
        kept.step([*steps, len(seconds)], [*sizes, sizes[-1]], style, where="post", linewidth=1.2)
    clock.set(xlabel="update", ylabel="milliseconds of a step", ylim=(0, None))
    kept.set(xlabel="update", ylabel="kept for the backward pass, MB", ylim=(0, None))
    for axis in (clock, kept):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
