"""A small model in a folder and small data files, for the main job."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.launch import launch

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "a", "is", "was", "very", "not"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


def make_tiny_model(folder: Path) -> Path:
    """A BERT of two small layers without dropout, with its tokenizer, in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_reviews(path: Path, rows: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            label = rng.choice(["positive", "negative"])
            mood = WORDS[:3] if label == "positive" else WORDS[3:6]
            writer.writerow([" ".join([rng.choice(WORDS[6:]), rng.choice(WORDS[6:]), rng.choice(mood)]), label])


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv (100 rows) and dev.csv (33 rows: not a multiple of anything)."""
    folder = tmp_path_factory.mktemp("reviews")
    write_reviews(folder / "train.csv", 100, seed=0)
    write_reviews(folder / "dev.csv", 33, seed=1)
    return folder


@pytest.fixture
def arguments(tiny_model: Path, reviews: Path, tmp_path: Path) -> list[str]:
    """Command line of a short run: 2 epochs of 6 updates of 16 examples."""
    options = {
        "run.dir": tmp_path / "run",
        "run.log_every": 1,
        "model.name": tiny_model,
        "data.task": "files",
        "data.train_file": reviews / "train.csv",
        "data.validation_file": reviews / "dev.csv",
        "train.epochs": 2,
        "train.batch_size": 16,
        "freezing.initial_epochs": 0.5,
        "freezing.final_epochs": 0.5,
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def profiled(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks with ZeRO-2 and --profile."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    options = {
        "run.dir": folder,
        "run.log_every": 2,
        "model.name": tiny_model,
        "data.task": "files",
        "data.train_file": reviews / "train.csv",
        "data.validation_file": reviews / "dev.csv",
        "train.epochs": 4,
        "train.batch_size": 16,
        "freezing.initial_epochs": 1,
        "freezing.final_epochs": 1,
        "profile.steps": 3,
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    done = launch("zero2", 2, "-m", "aflora_dist.training.run", *arguments, "--profile")
    assert done.returncode == 0, done.stderr
    assert "1_before, 2_middle, 3_after" in " ".join(done.stdout.replace("│", " ").split())
    return folder
