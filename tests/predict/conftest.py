"""Small runs that predict: a classifier's, a regression's, a language model's."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from aflora_dist.training.run import main as train
from tests.predict.asked import LEARNS, read
from tests.runs import options
from tests.small_lm import make_small_language_model, write_problems


@pytest.fixture(scope="session")
def classifier(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    assert train(options(folder, tiny_model, reviews, **LEARNS)) == 0
    return folder


@pytest.fixture(scope="session")
def regression(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On how many words a text has; dev.csv lies beside the run."""
    folder = tmp_path_factory.mktemp("regression")
    for name in ("train", "dev"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(
                [row["text"], len(row["text"].split()) / 8 + 0.01] for row in read(reviews / f"{name}.csv")
            )
    assert train(options(folder / "run", tiny_model, folder, **LEARNS)) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's run; dev.jsonl lies beside it."""
    folder = tmp_path_factory.mktemp("talker")
    model = make_small_language_model(folder / "model")
    write_problems(folder / "train.jsonl", 48, seed=0)
    write_problems(folder / "dev.jsonl", 13, seed=1)
    more = {
        "data.task": "sft",
        "data.train_file": folder / "train.jsonl",
        "data.validation_file": folder / "dev.jsonl",
        "data.max_new_tokens": 12,
        "train.epochs": 2,
        "train.learning_rate": 0.02,
    }
    assert train(options(folder / "run", model, folder, **more)) == 0
    return folder / "run"
