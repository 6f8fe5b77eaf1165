"""What a shipped study trains can be trained: each of its methods on a small model, as `aflora plan` rehearses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aflora_dist.plan.command import main as plan_main
from aflora_dist.study.description import read_study, shipped
from aflora_dist.study.grid import Grid, Planned
from aflora_dist.study.results import Results
from tests.small_lm import make_small_language_model, write_problems
from tests.study.written import settle

METRICS = ("accuracy", "exact_match", "loss", "matthews_correlation", "pearson", "spearmanr", "f1")


def came_to(run: Planned) -> dict[str, Any]:
    metrics = dict.fromkeys(METRICS, 0.5)
    return {"accuracy": 0.5, "metrics": metrics, "evaluations": [metrics]}


@pytest.mark.parametrize("name", shipped())
def test_each_method_of_a_shipped_study_begins(name: str, tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    """LoRA with freezing on a language model was refused: without a head all that trains would have frozen."""
    files = {"data.train_file": reviews / "train.csv", "data.validation_file": reviews / "dev.csv"}
    more: dict[str, Any] = {"model.name": tiny_model, "data.task": "files", **files}
    if name == "word_problems":
        write_problems(tmp_path / "train.jsonl", 256, seed=0)
        write_problems(tmp_path / "test.jsonl", 8, seed=1)
        files = {"data.train_file": tmp_path / "train.jsonl", "data.validation_file": tmp_path / "test.jsonl"}
        more = {"model.name": make_small_language_model(tmp_path / "lm"), **files}
    study = read_study(shipped()[name], small=True)
    grid = Grid(study.restricted([*study.tasks][:1], [], []), {key: str(value) for key, value in more.items()})
    agenda = settle(grid, Results(tmp_path / "results"), came_to)
    assert {method for _, method in agenda.reported} == {*study.methods}
    for runs in agenda.reported.values():
        assert plan_main([*next(iter(runs.values())).line(), "--run.dir", str(tmp_path / "run"), "--ranks", "1"]) == 0
