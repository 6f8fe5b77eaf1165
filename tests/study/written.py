"""Study files and results for tests, with nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Agenda, Grid, Planned
from aflora_dist.study.results import Results

TASKS = {"reviews": {"preset": "demo"}}


def write_study(folder: Path, **said: Any) -> Path:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({"tasks": TASKS, "seeds": [0, 1, 2], **said}))
    return file


def grid_of(folder: Path, **said: Any) -> Grid:
    return Grid(read_study(write_study(folder, **said)))


def keep(results: Results, run: Planned, accuracy: float, **more: Any) -> None:
    metrics = {"accuracy": accuracy}
    found: Mapping[str, Any] = {"metrics": metrics, "evaluations": [metrics], "train_examples": 4992, "steps": 78}
    results.keep(run.name, run.config, {**found, "train_seconds": 10.0, "avg_trainable_params": 100.0, **more}, 12.0)


def settle(grid: Grid, results: Results, accuracy: Any) -> Agenda:
    """The study as if each of its runs had come to what `accuracy` says of it; a number, or a mapping of fields."""
    while True:
        agenda = grid.plan(results.records)
        left = [run for run in agenda.runs() if run.name not in results.records]
        if not left:
            assert not agenda.open
            return agenda
        for run in left:
            said = accuracy(run)
            keep(results, run, **(said if isinstance(said, dict) else {"accuracy": said}))
