"""What a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.table import Table

from ..names import times_as_many
from ..store.best import LOWER_IS_BETTER
from ..store.records import FREEZE_LOG, METRICS, RESULT, Result

_METHODS = {None: "AFLoRA", "aflora": "AFLoRA", "full": "Full fine-tuning"}
_KINDS = {"adapter": "/", "lora": "/ for servers", "tensorboard": "/"}


def print_summary(result: Result, directory: str, console: Console | None = None) -> None:
    """The result as a table, on this process's standard output unless a console is given."""
    method = _METHODS.get(result.method, result.method)
    table = Table(title=f"{method} on {result.task}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in figures(result):
        table.add_row(name, value)
    if result.traces:
        names = ", ".join(path.rsplit("/", 1)[-1] for path in result.traces)
        table.add_row("traces", f"{names}, in {directory}/tensorboard/profile/ (*.json.gz opens in Perfetto)")
    board = any(Path(directory, "tensorboard").glob("**/*"))
    run = quote(directory if not directory.startswith("-") else f"./{directory}")  # to be copied
    table.add_row("look", f"aflora show {run}" + f", or tensorboard --logdir {run}/tensorboard" * board)
    there = [name for name in ("adapter", "lora", FREEZE_LOG, METRICS, RESULT) if Path(directory, name).exists()]
    told = [f"{name}{_KINDS.get(name, '')}" for name in (*there, *["tensorboard"] * board)]
    table.add_row("files", f"{directory}/ ({', '.join(told)})")
    (console or Console(markup=False, emoji=False, highlight=False)).print(table)


def figures(result: Result) -> Iterator[tuple[str, str]]:
    """What a run came to, as names and texts."""
    for name, value in result.metrics.items():
        yield name.replace("_", " "), f"{_number(value)}{_beside(result, name)}"
    average, lora = result.avg_trainable_params, result.lora_r8_trainable_params
    if average is not None:
        than = f"; LoRA r=8 has {lora:,}: {times_as_many(lora, average)}" if lora is not None else ""
        yield "trainable parameters", f"{average:,.0f} on average{than}"
    if result.freezable_matrices and result.freeze_events is not None:
        count = "" if result.frozen_matrices in (None, result.freezable_matrices) else f"{result.frozen_matrices} of "
        yield "froze", f"{count}{result.freezable_matrices} projection matrices in {result.freeze_events} events"
    if result.freezable_matrices and result.freeze_seconds_total is not None:
        share = (
            f", {result.freeze_seconds_total / result.train_seconds:.2%} of training" if result.train_seconds else ""
        )
        yield "time spent freezing", f"{result.freeze_seconds_total:.2f} s{share}"
    yield "training", ", ".join(_training(result))


def _beside(result: Result, name: str) -> str:
    """The metric in other epochs than the one that counts."""
    values = [value for evaluation in result.evaluations if (value := evaluation.get(name)) is not None]
    if len(result.evaluations) < 2 or not values:
        return ""
    if result.best_epoch is not None:
        return f"  (epoch {result.best_epoch:g}, kept; last epoch {_number(result.evaluations[-1].get(name))})"
    return f"  (best epoch {_number((min if name in LOWER_IS_BETTER else max)(values))})"


def _training(result: Result) -> list[str]:
    """Steps, time, rates and engine, as far as they are known."""
    found = []
    if result.steps is not None and result.train_seconds is not None:
        found.append(f"{result.steps} steps in {result.train_seconds:.1f} s")
    if result.samples_per_second is not None:
        found.append(f"{result.samples_per_second:.1f} examples/s")
    if result.tokens_per_second is not None:
        found.append(f"{result.tokens_per_second:,.0f} tokens/s")
    if result.mfu is not None:
        found.append(f"{result.mfu:.1%} of the peak (MFU)")
    if result.world_size is not None and result.engine is not None:
        found.append(f"{result.world_size} x {result.engine}")
    return found


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"
