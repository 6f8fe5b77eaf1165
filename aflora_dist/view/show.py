"""`aflora show RUN`: a run's story in a terminal, and its figures as files. Reads the run's directory only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import writing
from ..extras import require
from ..names import freeze_map_cells, grid, stack_names
from ..store.records import Run as Run
from .terminal import console as create_console
from .terminal import warn

_BARS = "▁▂▃▄▅▆▇█"
_CURVES = (
    ("loss", "loss", "{:.4f}"),
    ("gradient norm", "grad_norm", "{:.3g}"),
    ("learning rate", "lr", "{:.2g}"),
    ("trainable", "trainable_params", "{:,.0f}"),
    ("examples/s", "samples_per_second", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("share of peak", "mfu", "{:.1%}"),
)
_LARGEST_MAP = 50_000  # cells; models have a hundred columns and thirty rows
# Dark to light, as viridis; a step's cell takes the colour of its share of the training.
_COLOURS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


def sparkline(values: Sequence[float | None], width: int = 60) -> str:
    """At most `width` bars: means of equally many neighbours, lowest to highest."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    size = max(1, -(-len(known) // width))
    means = [sum(part) / len(part) for part in (known[i : i + size] for i in range(0, len(known), size))]
    low, high = min(means), max(means)
    return "".join(_BARS[round((v - low) / (high - low or 1) * (len(_BARS) - 1))] for v in means)


def print_run(run: Run, console: Console) -> None:
    """Header, curves, Fig. 5 and result."""
    known = run.metrics or run.total_steps > run.done  # before the first line nothing else may tell T
    total = f" of {run.total_steps}" if known else ""
    state = "finished" if run.result else f"after {run.done}{total} steps"
    console.print(Text(f"{run.settings.model} on {run.settings.task}: {state}", style="bold"))
    curves = []
    for title, key, form in _CURVES:
        values = [value for line in run.metrics if (value := getattr(line, key)) is not None]
        if values:
            curves.append((title, values, f"{form.format(values[0])} to {form.format(values[-1])}"))
    if curves:
        beside = sum(max(map(len, texts)) + 2 for texts in ([t for t, _, _ in curves], [s for _, _, s in curves]))
        table = Table.grid(padding=(0, 2))
        for title, values, span in curves:
            bars = sparkline(values, max(1, min(60, console.width - beside - 2)))
            table.add_row(title, Text(bars, style="cyan", no_wrap=True), span)
        console.print(table)
    if run.events:
        print_freeze_map(run, console)
    if run.result is not None:
        from .report import print_summary

        print_summary(run.result, str(run.path), console)


def print_freeze_map(run: Run, console: Console) -> None:
    """Fig. 5: rows are kinds of matrices, columns layers, a cell the step after which the matrix froze."""
    columns, rows, at = freeze_map_cells(run.names, run.frozen, _ends(run))
    if len(columns) * len(rows) > _LARGEST_MAP:
        console.print(f"{len(run.frozen)} of {len(run.names)} matrices frozen, in too many places for a map.")
        return
    width, called = len(str(run.total_steps)), stack_names(stack for stack, _ in columns)
    # As many layers side by side as fit.
    room = max(1, (console.width - max(map(len, rows)) - 4) // (width + 3))
    for first in range(0, len(columns), room):
        part = columns[first : first + room]
        table = Table(title="step after which each matrix froze, by layer" if not first else None, title_justify="left")
        table.add_column("")
        for stack, layer in part:
            table.add_column(f"{called[stack]}{layer}", justify="right")
        for kind in rows:
            cells = []
            for column in part:
                step = at.get((kind, column))
                if step is None:
                    cells.append(Text("trains" if (kind, column) in at else ""))
                    continue
                shade = round(step / max(run.total_steps - 1, 1) * (len(_COLOURS) - 1))
                cells.append(
                    Text(f"{step:>{width}}", style=f"{'black' if shade > 3 else 'white'} on {_COLOURS[shade]}")
                )
            table.add_row(kind, *cells)
        console.print(table)
    console.print(f"{len(run.frozen)} of {len(run.names)} projection matrices frozen in {len(run.events)} events.")


def _ends(run: Run) -> list[tuple[int, int]]:
    return [(event.step, event.backward_from or 0) for event in run.events]


def write_figures(run: Run, folder: Path, form: str) -> list[Path]:
    """freeze_map, curves and scores as PNG or SVG files.

    Raises:
        AFLoRAError: The folder cannot be written, or matplotlib is not installed.
    """
    require("train", "aflora show --figures", "matplotlib")
    from ..figures import curves, freeze_map, score_curves  # matplotlib takes a second, and is needed here alone

    lora = run.result.lora_r8_trainable_params if run.result else None
    head = run.result.head_params if run.result else None
    drawn = {}
    if run.metrics:
        drawn["curves"] = curves(run.metrics, lora, head or 0)
    columns, rows = grid(run.names)
    events = run.events if len(columns) * len(rows) <= _LARGEST_MAP else []
    if events:
        drawn["freeze_map"] = freeze_map(run.names, run.frozen, run.total_steps, _ends(run))
    if any(event.scores for event in events):
        drawn["scores"] = score_curves(run.events, run.total_steps, run.score)
    paths = []
    with writing("The figures", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            paths.append(folder / f"{name}.{form}")
            figure.savefig(paths[-1], dpi=150)
    return paths


def main(arguments: list[str]) -> int:
    """`aflora show`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="aflora show", description="Print a run's story; write its figures.")
    parser.add_argument("run", type=Path, help="the run's directory (run.dir)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write the figures there")
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures")
    args = parser.parse_args(arguments)
    console = create_console()
    run = Run(args.run)
    warn(run.problems)
    print_run(run, console)
    if args.figures is not None:
        for path in write_figures(run, args.figures, args.format):
            console.print(f"wrote {path}", soft_wrap=True)
    return 0
