"""What a study's runs came to, a cell for each method on a task, and which differences they show. Numbers, no text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from ..store.best import LOWER_IS_BETTER
from .choice import Records, no_metric, seconds_of
from .differences import Difference, corrected_for, paired
from .grid import Grid

AVERAGE = "average"  # over the tasks, where there are several
WAY = ("engine", "world_size", "mixed_precision", "device", "version")  # how and with what a run ran: not in its name


@dataclass(frozen=True)
class Cell:
    """A method on a task; metrics but losses are in points (x 100), as the paper's.

    Attributes:
        values: After the last epoch, by seed.
        best: After the best epoch, which is chosen by the very data that are reported: too good, as in the paper.
        failed: Runs that broke down.
        missing: Runs that have not been done.
        trained_by: By seed, parameters on average over the updates, the head's left out.
        seconds_by: By seed, of training; of a CPU's core where that was measured.
        spans: From when to when its runs ran, where that was kept.
        ways: How its runs were launched, by WAY.
        chosen: What was searched for it.
        paper: What the paper reports.
        broken: Why it has no values, where that is neither.
        runs: By seed, their names.
    """

    task: str
    method: str
    metric: str
    values: dict[int, float]
    best: dict[int, float]
    failed: int
    missing: int
    trained_by: dict[int, float]
    seconds_by: dict[int, float]
    chosen: str
    paper: float | None
    broken: str = ""
    spans: tuple[tuple[datetime, datetime], ...] = ()
    ways: tuple[dict[str, Any], ...] = ()
    runs: Mapping[int, str] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return _mean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def best_mean(self) -> float | None:
        return _mean(self.best)

    @property
    def trained(self) -> float | None:
        return _mean(self.trained_by)

    @property
    def seconds(self) -> float | None:
        return _mean(self.seconds_by)


def _mean(by_seed: Mapping[int, float]) -> float | None:
    return statistics.fmean(by_seed.values()) if by_seed else None


@dataclass(frozen=True)
class Compared:
    """A method less another one, on a task or on average."""

    task: str
    method: str
    other: str
    metric: str
    difference: Difference
    lost: int = 0  # runs of either that broke down: the seeds that are left went well
    same: str = ""  # that it is no comparison of its own

    @property
    def seen(self) -> bool:
        """Whether the methods may be said to differ."""
        return self.difference.seen and not self.lost

    @property
    def better(self) -> bool:
        """Whether the difference, as it is, speaks for the method."""
        return (self.difference.mean < 0) == (self.metric in LOWER_IS_BETTER)

    @property
    def said(self) -> str:
        if self.same == self.other:
            return "the same runs"
        if self.lost:
            return f"no verdict: {self.lost} diverged"
        if self.difference.alike:
            return "the same on each seed: no p"
        if self.difference.p is None:
            return "one seed: no p"
        said = f"{self.method if self.better else self.other} is better" if self.seen else "no difference seen"
        return f"{said} (the runs of {self.same})" if self.same else said


def cells(grid: Grid, records: Records) -> list[Cell]:
    """What the runs that are there came to; a line per task and method."""
    plan, found = grid.plan(records), []
    for task in grid.study.tasks:
        metric = grid.metrics[task]
        scale = 1.0 if metric in LOWER_IS_BETTER else 100.0
        best_of = min if metric in LOWER_IS_BETTER else max
        for method in grid.study.reported:
            runs = plan.reported.get((task, method), {})
            there = {seed: records[run.name] for seed, run in runs.items() if run.name in records}
            well = {seed: r for seed, r in there.items() if "failed" not in r}
            lacking = [r for r in well.values() if metric not in r["metrics"]]
            said = no_metric(f"{method} on {task}", metric, lacking[0]) if lacking else ""
            ended = {seed: r for seed, r in well.items() if r["evaluations"][-1].get(metric) is not None}
            chosen = plan.chosen.get((task, method), {})
            found.append(
                Cell(
                    task,
                    method,
                    metric,
                    {seed: scale * _values(r, metric)[-1] for seed, r in ended.items()},
                    {seed: scale * best_of(_values(r, metric)) for seed, r in ended.items()},
                    len(there) - len(ended) - len(lacking),
                    0 if (task, method) in plan.broken else len(grid.study.seeds) - len(there),
                    {s: r["avg_trainable_params"] for s, r in ended.items() if "avg_trainable_params" in r},
                    {seed: seconds_of(r) for seed, r in ended.items()},
                    ", ".join(f"{name.partition('.')[2]} {value}" for name, value in chosen.items()),
                    grid.study.paper.get(method, {}).get(task),
                    plan.broken.get((task, method), said),
                    tuple(map(_span, ended.values())),
                    tuple(map(_way, ended.values())),
                    {seed: run.name for seed, run in runs.items()},
                )
            )
        for method, quoted in grid.study.paper.items():
            if task in quoted and method not in grid.study.methods:
                found.append(Cell(task, method, metric, {}, {}, 0, 0, {}, {}, "", quoted[task]))
    return found


def _way(record: Mapping[str, Any]) -> dict[str, Any]:
    device = "CPU" if record.get("train_cpu_seconds") else "unknown"
    return {"device": device} | {key: record.get(key, "unknown") for key in WAY if key != "device"}


def _span(record: Mapping[str, Any]) -> tuple[datetime, datetime]:
    end = datetime.fromisoformat(record["ended"])
    return end - timedelta(seconds=record["seconds"] or record["train_seconds"]), end


def _values(record: Mapping[str, list[dict[str, float | None]]], metric: str) -> list[float]:
    """After each epoch after which it was a number."""
    return [value for epoch in record["evaluations"] if (value := epoch.get(metric)) is not None]


def compared(grid: Grid, found: Sequence[Cell]) -> list[Compared]:
    """The comparisons that the study names, task by task and on average, corrected for how many they are.

    One of the same runs as another's is none of its own: it has that one's p.
    """
    by = {(cell.task, cell.method): cell for cell in found}
    tasks = [*grid.study.tasks]
    several = len(tasks) > 1 and not any(metric in LOWER_IS_BETTER for metric in grid.metrics.values())
    pairs: list[Compared] = []
    first: dict[Any, int] = {}  # of the same runs
    twin: list[int] = []
    for both in grid.study.compare:
        on = [(task, grid.metrics[task], [[by[task, method]] for method in both]) for task in tasks]
        if several:
            on.append((AVERAGE, AVERAGE, [[by[task, method] for task in tasks] for method in both]))
        for task, metric, sides in on:
            ours, theirs = (_averages(side) for side in sides)
            if (difference := paired(ours, theirs)) is None:
                continue
            lost = sum(cell.failed for side in sides for cell in side)
            runs = [json.dumps([sorted(cell.runs.items()) for cell in side]) for side in sides]
            twin.append(first.setdefault((task, *sorted(runs)), len(pairs)))
            other = pairs[twin[-1]] if twin[-1] < len(pairs) else None
            same = both[1] if runs[0] == runs[1] else "" if other is None else f"{other.method} - {other.other}"
            pairs.append(Compared(task, *both, metric, difference, lost, same))
    own = [i for i, pair in enumerate(pairs) if not pair.same]
    corrected = {i: d.corrected for i, d in zip(own, corrected_for([pairs[i].difference for i in own]), strict=True)}
    return [
        replace(pair, difference=replace(pair.difference, corrected=corrected.get(at)))
        for pair, at in zip(pairs, twin, strict=True)
    ]


def _averages(of_method: Sequence[Cell]) -> dict[int, float]:
    """By seed, of those that all tasks have."""
    seeds = set.intersection(*({*cell.values} for cell in of_method))
    return {seed: statistics.fmean(cell.values[seed] for cell in of_method) for seed in sorted(seeds)}
