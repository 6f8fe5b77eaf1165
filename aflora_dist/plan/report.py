"""A plan for people: tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from ..names import times_as_many
from .events import Elements, PlannedFreeze
from .records import EnginePlan, Plan

_EVENTS = 24  # shown whole; of more, the first and the last ones
_WIDTH = 120  # where output goes to no terminal


def print_plan(plan: Plan) -> None:
    """On this process's standard output."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, emoji=False)
    for part in _parts(plan):
        console.print(part, markup=False)


def _parts(plan: Plan) -> Iterator[Table | str]:
    yield f"Plan: {plan.method} on {plan.model} for {plan.task}. Nothing was trained, and no weights were loaded.\n"
    yield from _steps(plan)
    yield from _parameters(plan)
    yield from _freezes(plan)
    able = [engine for engine in plan.engines if engine.refused is None]
    yield from _engines(able)
    for engine in plan.engines:
        if engine.refused is not None:
            yield f"Refused on {engine.ranks} x {engine.engine}: {engine.refused}"
    for assumption in plan.assumptions:
        yield f"Assumed: {assumption}."
    yield f"The run would write {', '.join(plan.writes)} into {plan.directory}."
    yield plan.directory_taken or "That folder is free."


def _steps(plan: Plan) -> Iterator[str]:
    steps = plan.steps
    tokens = "" if steps.tokens is None else f", about {steps.tokens:,} tokens"
    left_out = f" ({steps.left_out} examples left out of each)" if steps.left_out else ""
    yield (
        f"{steps.examples:,} examples: {steps.per_epoch:,} updates an epoch{left_out}{tokens}; T = {steps.total:,} "
        f"updates in all"
    )
    if steps.initial is not None and steps.final is not None:
        yield (
            f"Freezing begins after t_i = {steps.initial:,} and ends t_f = {steps.final:,} before the end, with update "
            f"{steps.total - steps.final:,}"
        )
    elif steps.initial is not None:
        yield f"Freezing begins after t_i = {steps.initial:,}; when it ends, scores will say"
    rates = ", ".join(f"{rate:g} ({what})" for what, rate in steps.learning_rates.items())
    yield f"Learning rates at their peak, after {steps.warm_up:,} updates: {rates}\n"


def _parameters(plan: Plan) -> Iterator[Table | str]:
    found = plan.parameters
    table = _table("Trainable parameters", ["", "start", "average", "end"])
    table.add_row(plan.method, f"{found.start:,}", _range(found.average), f"{found.end:,}")
    table.add_row("head", *[f"{found.head:,}"] * 3)
    table.add_row("LoRA r=8, same layers", *[f"{found.lora_r8:,}"] * 3)
    yield table
    times = times_as_many(found.lora_r8, found.average.expected)
    yield (
        f"On average LoRA r=8 has {times}. The whole model has {found.model:,} parameters, "
        f"{decimal(found.model_bytes)} as it is loaded, unquantised.\n"
    )


def _freezes(plan: Plan) -> Iterator[Table | str]:
    events = plan.freezes
    if not events:
        yield "Which matrices freeze when is not known beforehand.\n" if plan.matrices else "Nothing freezes.\n"
        return
    table = _table(
        f"{plan.matrices} matrices freeze in {len(events)} events",
        ["after step", "freeze", "remain", "then train, head included"],
    )
    shown: list[PlannedFreeze | None] = list(events)
    if len(events) > _EVENTS:
        shown = [*events[: _EVENTS // 2], None, *events[-_EVENTS // 2 :]]
    for event in shown:
        if event is None:
            table.add_row("...", "...", "...", "... (--json has all)")
        else:
            table.add_row(f"{event.step:,}", f"{event.freezes}", f"{event.remaining}", _range(event.trainable))
    yield table


def _engines(plans: list[EnginePlan]) -> Iterator[Table | str]:
    columns = ["", "micro-batches", "moments", "scores", "checkpoint"]
    table = _table("What the fullest rank holds, from the start to the end", columns)
    for plan in plans:
        table.add_row(
            f"{plan.ranks} x {plan.engine}",
            f"{plan.micro_batches}",
            _both(*(max(each) for each in plan.optimizer_bytes)),
            _both(max(plan.score_bytes), 0),
            _both(*plan.checkpoint_bytes),
        )
    yield table
    yield "Micro-batches: of an update, on each rank.\n"


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    return table


def _range(elements: Elements) -> str:
    low, middle, high = (round(number) for number in (elements.least, elements.expected, elements.most))
    return f"{middle:,}" if low == high else f"{middle:,} ({low:,} to {high:,})"


def _both(start: int, end: int) -> str:
    return decimal(start) if start == end else f"{decimal(start)} to {decimal(end)}"
