"""`aflora collect FOLDER`: the runs of a job array as a table, mean and deviation over seeds."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import AFLoRAError, writing
from ..options import flat
from ..store.records import CONFIG, Outcome, Result, dumps, read_outcome
from .terminal import console, warn

_LEFT = ("task", "model", "differs in", "metric")


@dataclass
class Setting:
    """Runs that differ in their seed alone, each once."""

    task: str
    model: str
    options: dict[str, Any]
    runs: list[Outcome] = field(default_factory=list)

    @property
    def finished(self) -> dict[int | None, list[Result]]:
        """By seed; more than one where a seed was run several times."""
        found: dict[int | None, list[Result]] = {}
        for run in self.runs:
            if run.result is not None:
                found.setdefault(run.settings.seed, []).append(run.result)
        return found

    @property
    def unfinished(self) -> int:
        return sum(run.result is None for run in self.runs)

    def values(self, metric: str) -> list[float]:
        """The metric for each seed that has it; the mean of those that were run several times."""
        found = [[run.metrics.get(metric) for run in runs] for runs in self.finished.values()]
        return [statistics.fmean(numbers) for values in found if (numbers := [v for v in values if v is not None])]

    def mean(self, name: str) -> float | None:
        """Of a number of result.json over all that ended."""
        found = [value for runs in self.finished.values() for run in runs if (value := getattr(run, name)) is not None]
        return statistics.fmean(found) if found else None

    @property
    def metrics(self) -> list[str]:
        names = dict.fromkeys(name for runs in self.finished.values() for run in runs for name in run.metrics)
        return list(names) or ["-"]


def groups(folder: Path, problems: list[str]) -> list[Setting]:
    """The runs under `folder`, one entry per setting (everything but the seed and the directory).

    Args:
        problems: Takes a line for each thing that was left out, or is odd.

    Raises:
        AFLoRAError: There is no run under the folder.
    """
    if not os.path.isdir(folder):
        raise AFLoRAError(f"There is no folder {folder}.")
    runs = [run for path in walk(folder, problems) if (run := read_outcome(path, problems)) is not None]
    if not runs:
        raise AFLoRAError(f"There is no run under {folder}.")
    runs.sort(key=lambda run: run.result is None)  # of copies, one that has ended counts
    found: dict[str, Setting] = {}
    for run in runs:
        key = dumps(sorted(flat(run.settings.values).items()))
        entry = found.setdefault(key, Setting(run.settings.task, run.settings.model, run.settings.values))
        original = next((other for other in entry.runs if run.is_copy_of(other)), None)
        if original is not None:
            problems.append(f"{run.path} is a copy of {original.path}, counted once.")
        else:
            problems += _oddities(run, entry)
            entry.runs.append(run)
    return sorted(found.values(), key=lambda entry: (entry.task, entry.model))


def _oddities(run: Outcome, entry: Setting) -> Iterator[str]:
    if run.result is None:
        return
    if run.settings.seed in entry.finished:
        yield f"{run.path} is another run with seed {run.settings.seed}: their mean counts, once."
    other = next((there for there in entry.runs if there.result is not None), run)
    if None not in (here := _way(run), there := _way(other)) and here != there:
        yield (
            f"{run.path} ran as {here}, {other.path} as {there}: metrics may differ for that, and the mean of their "
            f"seconds says nothing."
        )
    for name, value in run.result.metrics.items():
        if value is None:
            yield f"{run.path}: {name} is not a number in its result; it does not count."


def _way(run: Outcome) -> str | None:
    """How a run was launched, which its configuration does not say; None: nothing does."""
    found = run.result
    if found is None or found.engine is None or found.world_size is None:
        return None
    return f"{found.world_size} x {found.engine}" + (f" in {found.mixed_precision}" if found.mixed_precision else "")


def walk(folder: Path, problems: list[str]) -> Iterator[Path]:
    """Folders with a config.yaml, depth first by name. Links are followed, but not up; no folder is seen twice."""

    def unread(error: OSError) -> None:
        problems.append(f"{error.filename} could not be read: {error.strerror or error}.")

    above = {(about.st_dev, about.st_ino) for up in folder.resolve().parents if (about := up.stat())}
    seen: set[tuple[int, int]] = set()
    for path, folders, files in os.walk(folder, onerror=unread, followlinks=True):
        try:
            about = os.stat(path)
        except OSError as error:  # gone meanwhile
            unread(error)
            continue
        here = about.st_dev, about.st_ino
        if here in above:
            problems.append(f"{path} leads out of {folder} and back up, and is not looked through.")
        if here in above | seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        if CONFIG in (*files, *folders):
            yield Path(path)


def rows(entries: list[Setting]) -> list[dict[str, Any]]:
    """A line per setting and metric; the deviation is the sample's (n - 1), absent for one seed."""
    table = []
    for entry in entries:
        for metric in entry.metrics:
            values = entry.values(metric)
            table.append(
                {
                    "task": entry.task,
                    "model": entry.model,
                    "differs in": _differences(entry, entries),
                    "metric": metric,
                    "seeds": len(values),
                    "unfinished": entry.unfinished,
                    "mean": statistics.fmean(values) if values else None,
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "trainable": entry.mean("avg_trainable_params"),
                    "seconds": entry.mean("train_seconds"),
                }
            )
    return table


def _differences(entry: Setting, entries: list[Setting]) -> str:
    """What tells this setting from the others of the same task; an option of a later release may be missing in it."""
    mine = flat(entry.options)
    same = [flat(other.options) for other in entries if other.task == entry.task]
    names = dict.fromkeys(name for options in (mine, *same) for name in options)
    return ", ".join(
        f"{name}={mine.get(name, 'not given')}"
        for name in names
        if any(options.get(name, same) != mine.get(name, same) for options in same)
    )


def main(arguments: list[str]) -> int:
    """`aflora collect`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="aflora collect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="looked through with all its subfolders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    args = parser.parse_args(arguments)
    problems: list[str] = []
    try:
        lines = rows(groups(args.folder, problems))
    finally:
        warn(problems)
    if args.json is not None:
        with writing("The table", args.json):
            args.json.write_text(dumps(lines, indent=2) + "\n", encoding="utf-8")
    table = Table()
    for title in (*_LEFT, "seeds", "mean ± deviation", "trainable", "seconds"):
        words = title in _LEFT  # which are folded, and numbers whole
        table.add_column(title, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for line in lines:
        deviation = "" if line["deviation"] is None else f" ± {line['deviation']:.4f}"
        table.add_row(
            line["task"],
            line["model"],
            line["differs in"],
            line["metric"],
            f"{line['seeds']}" + (f" (+{line['unfinished']} unfinished)" if line["unfinished"] else ""),
            "-" if line["mean"] is None else f"{line['mean']:.4f}{deviation}",
            "-" if line["trainable"] is None else f"{line['trainable']:,.0f}",
            "-" if line["seconds"] is None else f"{line['seconds']:.1f}",
        )
    console().print(table)
    return 0
