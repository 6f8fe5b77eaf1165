"""Evaluation: every example once, on any number of ranks, and the results in the data's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..options import DataConfig
from .batches import Batch, move
from .data import Data
from .metrics import compute
from .reading import listed
from .sources import trained_too


@torch.no_grad()
def gather_logits(
    model: nn.Module,
    batches: DataLoader[Batch],
    examples: int,
    width: int,
    accelerator: Accelerator,
    done: Callable[[int], Any] = lambda _: None,
) -> Tensor:
    """What the model says of each example: float32, (examples, width), in the data's order. A collective.

    Args:
        batches: With an `EvaluationSampler` as batch sampler.
        width: As many as there are classes; 1 in a regression.
        done: Told how many more examples the ranks have been through together.
    """
    model.eval()
    found = torch.zeros(examples, width, device=accelerator.device)
    order: Any = batches.batch_sampler
    for together, mine, batch in zip(order.rounds, order.shares(), batches, strict=True):
        logits = model(**move(batch, accelerator.device)).logits.float()
        found[mine] = logits[: len(mine)]
        done(len(together))
    return accelerator.reduce(found, "sum")  # a value of one rank, zeros of the others


def odd_evaluation(config: DataConfig, data: Data) -> Iterator[str]:
    """Why a number that is measured may say little: a line each."""
    if trained_too(config):
        yield "What is measured with is trained on, too: the numbers say nothing of other texts."
    if data.labels is None:
        return
    for split, rows in data.evaluation.items():
        if len(found := set(rows["label"][:])) == 1 and len(rows) > 1:
            first = " data.max_eval_examples takes the first ones of a split." if config.max_eval_examples else ""
            alone = listed([data.labels[number] for number in found])
            yield f"All {len(rows):,} examples of the {split} split are of one class, {alone}.{first}"


def measured(data: Data) -> list[str]:
    """Names of the metrics. Those of several splits carry the split's suffix: accuracy_matched, accuracy_mismatched."""
    return [f"{name}{split.removeprefix('validation')}" for split in data.evaluation for name in data.metrics]


def evaluate(
    model: nn.Module, splits: dict[str, DataLoader[Batch]], data: Data, accelerator: Accelerator
) -> dict[str, float]:
    """The task's metrics, named as `measured` says. A collective."""
    metrics = {}
    for split, batches in splits.items():
        labels = np.asarray(data.evaluation[split]["label"][:], dtype=np.float64)
        width = 1 if data.labels is None else len(data.labels)
        logits = gather_logits(model, batches, len(labels), width, accelerator)
        predictions = logits.squeeze(-1) if data.labels is None else logits.argmax(-1)
        values = compute(data.metrics, labels, predictions.double().cpu().numpy(), data.positive)
        metrics.update({f"{name}{split.removeprefix('validation')}": value for name, value in values.items()})
    return metrics
