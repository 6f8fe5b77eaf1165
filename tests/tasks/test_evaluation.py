"""An evaluation that is sorted and dealt out says of each example what a plain one says, in the data's order."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aflora_dist.tasks.batches import loader
from aflora_dist.tasks.data import Data
from aflora_dist.tasks.evaluation import compute, evaluate, gather_logits
from aflora_dist.tasks.sampler import EvaluationSampler


class Reader(nn.Module):
    """Says something of each text that no other text has, padding left out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        value = (input_ids.double() ** 1.5).sum(1, keepdim=True)
        numbers = torch.arange(self.classes)
        return SimpleNamespace(logits=value if self.classes == 1 else -((value % self.classes).floor() - numbers).abs())


def texts(count: int) -> list[dict[str, Any]]:
    chance = random.Random(count)
    return [
        {"input_ids": [chance.randint(1, 99) for _ in range(chance.randint(1, 30))], "labels": i} for i in range(count)
    ]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": padded, "labels": torch.tensor([row["labels"] for row in rows])}


def on_ranks(world_size: int, rows: list[dict[str, Any]], model: nn.Module, batch_size: int) -> list[Tensor]:
    """What each rank says before it is summed up."""
    alone: Any = SimpleNamespace(device=torch.device("cpu"), reduce=lambda found, how: found)
    found, sizes = [], set()
    for rank in range(world_size):
        order = EvaluationSampler([len(r["input_ids"]) for r in rows], batch_size, rank=rank, world_size=world_size)
        batches = loader(rows, order, collate, beside=False)
        assert len(batches) == len(list(batches))
        assert all(0 < len(batch["labels"]) <= batch_size for batch in batches)
        sizes.add(len(batches))
        found.append(gather_logits(model, batches, len(rows), getattr(model, "classes", 2), alone))
    assert len(sizes) == 1, "sharded engines want as many batches on every rank"
    return found


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 7, 12, 33])
def test_each_example_counts_once_and_in_its_place(count: int, world_size: int, classes: int) -> None:
    rows, model = texts(count), Reader(classes)
    plain = [model(**collate([row])).logits[0] for row in rows]
    assert torch.equal(sum(on_ranks(world_size, rows, model, batch_size=4)), torch.stack(plain).float())


def test_ranks_are_given_texts_of_about_the_same_length_and_the_longest_first() -> None:
    lengths = [random.Random(5).randint(3, 120) for _ in range(1)] + [len(row["input_ids"]) for row in texts(99)]
    ranks = [list(EvaluationSampler(lengths, 4, rank=rank, world_size=3)) for rank in range(3)]
    longest = [[max(lengths[i] for i in batch) for batch in batches] for batches in ranks]
    assert all(list(batches) == sorted(batches, reverse=True) for batches in longest)
    assert all(max(together) - min(together) <= 2 for together in list(zip(*longest, strict=True))[1:])


def test_metrics_pair_each_result_with_its_own_label() -> None:
    rows, model = texts(33), Reader(1)
    said = on_ranks(1, rows, model, 8)[0].squeeze(-1)
    labels = said.double().numpy() + np.random.default_rng(0).normal(0, 300, 33)
    order = EvaluationSampler([len(row["input_ids"]) for row in rows], 8, rank=0, world_size=1)
    data: Any = Data("x", rows, {"validation_far": {"label": labels}}, None, ("pearson",))  # type: ignore[arg-type, dict-item]
    alone: Any = SimpleNamespace(device=torch.device("cpu"), reduce=lambda found, how: found)
    metrics = evaluate(model, {"validation_far": loader(rows, order, collate, beside=False)}, data, alone)
    assert metrics == {"pearson_far": pytest.approx(np.corrcoef(labels, said.numpy())[0, 1], abs=1e-6)}
    assert metrics["pearson_far"] > 0.5
    assert compute(["pearson"], labels[::-1], said.double().numpy())["pearson"] < 0.5
