"""A run in pictures: the paper's Fig. 5, curves, scores, where a step's time goes. No display, no global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from .names import freeze_map_cells, grid, matrix_position, stack_names
from .options import ORDERS
from .store.records import Event, Update
from .traces import WindowReport, range_paths, short_name

_BLUE, _GOLD, _GREY, _ORANGE = "#1f5a96", "#c9a227", "#d9d9d9", "#e8833a"
_MOST_RANGES = 40  # rows of bars; a training has a dozen
_MAP = "viridis"


def freeze_map(
    names: Sequence[str], frozen: Mapping[str, int], total_steps: int, ends: Sequence[tuple[int, int]] = ()
) -> Figure:
    """Fig. 5: layer by matrix kind, the colour being the step after which the matrix froze.

    Args:
        names: All freezable matrices.
        frozen: Name -> step; who is not in it still trains. Names of others are left out.
        total_steps: T, the end of the colour scale.
        ends: (step, the lowest block that trains from then on), with `freezing.prefix`: a row more, for whole blocks.
    """
    columns, rows, cells = freeze_map_cells(names, frozen, ends)
    frozen = {name: frozen[name] for name in names if name in frozen}
    figure = Figure(figsize=(max(5.0, 2.6 + 0.5 * len(columns)), 1.7 + 0.34 * len(rows)), layout="constrained")
    axis = figure.add_subplot()
    scale: Any = ScalarMappable(Normalize(0, max(total_steps - 1, 1)), _MAP)
    small = len(columns) <= 40
    for (kind, where), step in cells.items():
        row, column = rows.index(kind), columns.index(where)
        colour, hatch = (_GREY, "///") if step is None else (scale.to_rgba(step), None)
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, hatch=hatch, edgecolor="white")
        axis.add_patch(cell)
        if step is not None and small:
            light = sum(scale.to_rgba(step)[:3]) / 3 > 0.55
            axis.text(column, row, str(step), ha="center", va="center", fontsize=7, color="black" if light else "white")
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="layer")
    called = stack_names(stack for stack, _ in columns)
    labels = [f"{called[stack]}{layer}" for stack, layer in columns]
    axis.set_xticks(range(len(columns)), labels, rotation=90 if len(called) > 1 else 0, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
    axis.set_title(f"{len(frozen)} of {len(names)} projection matrices frozen", fontsize=10)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(scale, ax=axis, label=f"froze after step (of {total_steps:,})", pad=0.02)
    if len(frozen) < len(names):
        figure.legend(
            handles=[Patch(facecolor=_GREY, hatch="///", edgecolor="white", label="still trains")],
            loc="outside lower left",
            frameon=False,
            fontsize=8,
        )
    return figure


def curves(metrics: Sequence[Update], lora_r8: int | None = None, head: int = 0) -> Figure:
    """Loss, gradient norm, trainable parameters and learning rates over the steps of metrics.jsonl.

    Args:
        lora_r8: What LoRA r=8 trains on the same layers.
        head: What is among the trainable parameters besides, and would be beside LoRA's.
    """
    steps = [line.step for line in metrics]
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    (loss, norm), (trained, rates) = figure.subplots(2, 2, sharex=True)
    loss.plot(steps, _values(metrics, "loss"), color=_BLUE)
    loss.set_ylabel("loss")
    norm.plot(steps, _values(metrics, "grad_norm"), color=_BLUE)
    norm.set_ylabel("gradient norm before clipping")
    trained.step(steps, _values(metrics, "trainable_params"), where="post", color=_BLUE, label="this run")
    if lora_r8:
        with_head = " and the head" if head else ""
        trained.axhline(lora_r8 + head, color=_GOLD, linestyle="--", label=f"LoRA r=8{with_head}")
        if head:
            trained.axhline(head, color=_GREY, linestyle=":", label="the head")
    trained.set_ylim(bottom=0)
    trained.set_ylabel("trainable parameters")
    trained.yaxis.set_major_formatter(lambda value, _: f"{value / 1e3:,.0f}k")
    rates.plot(steps, _values(metrics, "lr"), color=_BLUE, label="adapter")
    if any(line.head_lr is not None for line in metrics):
        rates.plot(steps, _values(metrics, "head_lr"), color=_GOLD, linestyle="--", label="head")
    rates.set_ylabel("learning rate")
    for axis in (trained, rates):
        axis.set_xlabel("step (optimizer update)")
        axis.legend(frameon=False, fontsize=8)
    for axis in (loss, norm, trained, rates):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _values(metrics: Sequence[Update], key: str) -> list[float]:
    """A gap where there is no value."""
    return [math.nan if (value := getattr(line, key)) is None else value for line in metrics]


def score_curves(events: Sequence[Event], total_steps: int, kind: str) -> Figure:
    """Every matrix's freezing score at the freeze events, with a dot where it froze; the colour is its layer.

    Args:
        kind: What freezing.score is.
    """
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axis = figure.add_subplot()
    names = sorted({name for event in events for name in event.scores})
    columns, _ = grid(names)
    frozen = {name for event in events for name in event.frozen}
    position = {column: i for i, column in enumerate(columns)}
    scale: Any = ScalarMappable(Normalize(0, max(len(columns) - 1, 1)), _MAP)
    for name in names:
        points = [(event.step, event.scores[name]) for event in events if name in event.scores]
        where = matrix_position(name)
        colour = scale.to_rgba(position[where.stack, where.layer])
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.8)
        if name in frozen:
            axis.plot(*points[-1], color=colour, marker="o", markersize=3)
    axis.set(xlim=(0, total_steps), xlabel="step (optimizer update)")
    if kind in ORDERS:  # the first may be 0
        axis.set_ylabel(f"place in the order {kind}, which no gradient decides", fontsize=8)
    else:
        axis.set(yscale="log")
        axis.set_ylabel(f"freezing score, mean of smoothed {kind} times its uncertainty (Eq. 4)", fontsize=8)
    axis.set_title("a dot: the matrix froze", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(scale, ax=axis, label="layer", pad=0.02)
    labelled = range(0, len(columns), max(1, len(columns) // 12))
    bar.set_ticks(list(labelled), labels=[str(columns[i][1]) for i in labelled])
    return figure


def window_bars(windows: Sequence[WindowReport]) -> Figure:
    """The windows of a profiled run side by side: the step of each rank, and a bar for each range and rank.

    Above what a step consists of (see `RankReport`), below the ranges on the host, by the ranges around them.
    """
    paths = range_paths(windows)[:_MOST_RANGES]
    ranks = sorted({r.rank for window in windows for r in window.ranks})
    bar = 0.8 / len(ranks)
    rows = max(len(paths) * max(1.0, len(ranks) / 2), 1.0)
    figure = Figure(figsize=(2.2 + 3.2 * len(windows), 1.6 + 0.3 * len(ranks) + 0.3 * rows), layout="constrained")
    heights = [0.5 + len(ranks), 0.5 + rows]
    axes = figure.subplots(2, len(windows), sharex=True, sharey="row", height_ratios=heights, squeeze=False)
    parts = {
        "computing": (_BLUE, "computing_ms"),
        "exposed communication": (_ORANGE, "exposed_ms"),
        "idle": (_GREY, "idle_ms"),
    }
    for (step, ranges), window in zip(axes.T, windows, strict=True):
        step.set_title(short_name(window.name), fontsize=10, parse_math=False)
        for r in window.ranks:
            row, start = ranks.index(r.rank), 0.0
            for name, (colour, attribute) in parts.items():
                width = getattr(r, attribute)
                step.barh(
                    row, width, left=start, height=0.8, color=colour, label=name if r is window.ranks[0] else None
                )
                start += width
            times = {t.path: t.host_ms for t in r.ranges}
            at = [i - 0.4 + (row + 0.5) * bar for i in range(len(paths))]
            shade = 1 - 0.6 * row / len(ranks)
            ranges.barh(at, [times.get(path, 0.0) for path in paths], height=bar, color=_BLUE, alpha=shade)
        for axis in (step, ranges):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        ranges.set_xlabel("ms per step; of each range a bar for each rank", fontsize=8)
    first, below = axes[0, 0], axes[1, 0]
    first.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks], fontsize=8)
    below.set_yticks(range(len(paths)), [" > ".join(path) for path in paths], fontsize=8, parse_math=False)
    for axis in (first, below):
        axis.invert_yaxis()
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
