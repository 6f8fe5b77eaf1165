"""A study's pictures: differences with their intervals, accuracy against seconds, Fig. 5 over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from ..figures import freeze_map
from .cells import Cell, Compared
from .choice import Records
from .grid import Grid
from .tables import measured_in

_BLUE, _GOLD, _GREY = "#1f5a96", "#c9a227", "#8a8f98"


def dots(pairs: Sequence[Compared]) -> Figure:
    """A dot for each difference, with its 95% interval; filled where a difference is seen."""
    figure = Figure(figsize=(7.2, 1.1 + 0.32 * len(pairs)), layout="constrained")
    axis = figure.add_subplot()
    axis.axvline(0, color=_GREY, linewidth=0.8)
    for row, one in enumerate(pairs):
        d = one.difference
        if d.low is not None and d.high is not None:
            axis.plot([d.low, d.high], [row, row], color=_BLUE, linewidth=1.5)
        axis.plot(d.mean, row, "o", color=_BLUE, markerfacecolor=_BLUE if one.seen else "white")
    axis.set_yticks(
        range(len(pairs)), [f"{p.method} - {p.other}, {p.task}" for p in pairs], fontsize=8, parse_math=False
    )
    axis.invert_yaxis()
    unit = measured_in({pair.metric for pair in pairs})
    axis.set_xlabel(f"difference in {unit}, 95% interval; filled: seen after correction", fontsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def against_seconds(found: Sequence[Cell]) -> Figure:
    """Each method at its seconds of training, a panel per task; bars are a standard error up and down."""
    tasks = [*dict.fromkeys(cell.task for cell in found)]
    figure = Figure(figsize=(4.4 * len(tasks) + 0.6, 3.6), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for cell in found:
            if cell.task != task or cell.mean is None or cell.seconds is None:
                continue
            error = (cell.deviation or 0.0) / len(cell.values) ** 0.5
            axis.errorbar(cell.seconds, cell.mean, yerr=error, fmt="o", color=_BLUE, ecolor=_GOLD, capsize=2)
            axis.annotate(
                cell.method, (cell.seconds, cell.mean), (4, 4), textcoords="offset points", fontsize=7, parse_math=False
            )
        metric = next(cell.metric for cell in found if cell.task == task)
        axis.set_title(task, fontsize=9, parse_math=False)
        axis.set_xlabel("seconds of training", fontsize=8)
        axis.set_ylabel(metric.replace("_", " "), fontsize=8, parse_math=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def mean_freeze_map(grid: Grid, records: Records, task: str, method: str) -> Figure | None:
    """Fig. 5: the step after which each matrix froze, the mean over seeds where it did with each; None: nothing did."""
    runs = grid.plan(records).reported.get((task, method), {}).values()
    there = [record for run in runs if (record := records.get(run.name)) and record.get("frozen")]
    if not there:
        return None
    names = [*dict.fromkeys(name for record in there for name in record["frozen"])]
    with_each = [name for name in names if all(name in record["frozen"] for record in there)]
    steps = {name: [record["frozen"][name] for record in there] for name in with_each}
    return freeze_map(names, {name: round(statistics.fmean(of)) for name, of in steps.items()}, there[0]["steps"])
