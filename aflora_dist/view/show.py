"""`aflora show RUN`: a run's story in a terminal, and its figures as files. Reads the run's directory only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import AFLoRAError, writing
from ..names import grid, place

_BARS = "▁▂▃▄▅▆▇█"
# Dark to light, as viridis; a step's cell takes the colour of its share of the training.
_COLOURS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


class Run:
    """What a run's directory holds so far; the run may still be going on.

    Raises:
        AFLoRAError: It is not a run's directory, or a file in it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.yaml").is_file():
            raise AFLoRAError(f"{path} is not a run's directory: it has no config.yaml.")
        self.config: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        self.metrics = self._lines("metrics.jsonl")
        self.events = self._lines("freeze_log.jsonl")
        result = path / "result.json"
        self.result: dict[str, Any] | None = json.loads(result.read_text()) if result.exists() else None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break  # being written, or of a process that was killed
                raise AFLoRAError(f"Line {number} of {file} is damaged: {error}.") from None
        return found

    @property
    def names(self) -> list[str]:
        """All matrices that were ranked at some time, in the model's order."""
        return list(dict.fromkeys(name for event in self.events for name in (*event["scores"], *event["frozen"])))

    @property
    def frozen(self) -> dict[str, int]:
        return {name: event["step"] for event in self.events for name in event["frozen"]}

    @property
    def total_steps(self) -> int:
        """T; while the run goes on, as far as its learning rate's epochs tell."""
        if self.result is not None:
            return int(self.result["steps"])
        if not self.metrics:
            return 1
        last = self.metrics[-1]
        return round((last["step"] + 1) / last["epoch"] * self.config["train"]["epochs"])


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
    config, last = run.config, run.metrics[-1] if run.metrics else None
    state = "finished" if run.result else f"after {last['step'] + 1 if last else 0} of {run.total_steps} steps"
    console.print(Text(f"{config['model']['name']} on {config['data']['task']}: {state}", style="bold"))
    table = Table.grid(padding=(0, 2))
    if last is not None:
        for title, key, form in (
            ("loss", "loss", "{:.4f}"),
            ("gradient norm", "grad_norm", "{:.3g}"),
            ("learning rate", "lr", "{:.2g}"),
            ("trainable", "trainable_params", "{:,.0f}"),
            ("examples/s", "samples_per_second", "{:.1f}"),
        ):
            values = [line[key] for line in run.metrics if line[key] is not None]
            if values:
                span = f"{form.format(values[0])} to {form.format(values[-1])}"
                table.add_row(title, Text(sparkline(values), style="cyan"), span)
        console.print(table)
    if run.events:
        print_freeze_map(run, console)
    if run.result is not None:
        from .report import print_summary

        print_summary(run.result, str(run.path), console)


def print_freeze_map(run: Run, console: Console) -> None:
    """Fig. 5: rows are kinds of matrices, columns layers, a cell the step after which the matrix froze."""
    columns, rows = grid(run.names)
    at = {(where.kind, (where.stack, where.layer)): name for name in run.names if (where := place(name))}
    width = len(str(run.total_steps))
    # As many layers side by side as fit.
    room = max(1, (console.width - max(map(len, rows)) - 4) // (width + 3))
    for first in range(0, len(columns), room):
        part = columns[first : first + room]
        table = Table(title="step after which each matrix froze, by layer" if not first else None, title_justify="left")
        table.add_column("")
        for stack, layer in part:
            several = len({stack for stack, _ in columns}) > 1
            table.add_column(f"{stack.split('.')[0]} {layer}" if several else str(layer), justify="right")
        for kind in rows:
            cells = []
            for column in part:
                name = at.get((kind, column))
                step = run.frozen.get(name) if name is not None else None
                if step is None:
                    cells.append(Text("trains" if name is not None else ""))
                    continue
                shade = round(step / max(run.total_steps - 1, 1) * (len(_COLOURS) - 1))
                cells.append(
                    Text(f"{step:>{width}}", style=f"{'black' if shade > 3 else 'white'} on {_COLOURS[shade]}")
                )
            table.add_row(kind, *cells)
        console.print(table)
    console.print(f"{len(run.frozen)} of {len(run.names)} projection matrices frozen in {len(run.events)} events.")


def write_figures(run: Run, folder: Path, form: str) -> list[Path]:
    """freeze_map, curves and scores as PNG or SVG files.

    Raises:
        AFLoRAError: The folder cannot be written.
    """
    from .figures import curves, freeze_map, score_curves  # matplotlib takes a second, and is needed here alone

    lora = run.result["lora_r8_trainable_params"] if run.result else None
    drawn = {}
    if run.metrics:
        drawn["curves"] = curves(run.metrics, lora)
    if run.events:
        drawn["freeze_map"] = freeze_map(run.names, run.frozen, run.total_steps)
    if any(event["scores"] for event in run.events):
        drawn["scores"] = score_curves(run.events, run.total_steps)
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
    console = Console()
    try:
        run = Run(args.run)
        print_run(run, console)
        if args.figures is not None:
            for path in write_figures(run, args.figures, args.format):
                console.print(f"wrote {path}", soft_wrap=True)
    except AFLoRAError as error:
        print(f"aflora: error: {error}", file=sys.stderr)
        return 2
    return 0
