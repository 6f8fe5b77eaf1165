"""`aflora predict` as its tests call it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from aflora_dist.predict import command

LEARNS = {"train.epochs": 8, "train.learning_rate": 0.05, "train.head_learning_rate": 0.05, "train.max_grad_norm": 0}


def predict(*arguments: Any) -> int:
    return command.main([str(argument) for argument in arguments])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
