"""Evaluation: every example once, on any number of ranks, and the results in the data's order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batches import Batch, move
from .data import Data
from .metrics import compute


@torch.no_grad()
def predict(
    model: nn.Module, batches: DataLoader[Batch], examples: int, regression: bool, accelerator: Accelerator
) -> Tensor:
    """What the model says of each example: class numbers or values, (examples,), in the data's order. A collective.

    Args:
        batches: With an `EvaluationSampler` as batch sampler.
    """
    model.eval()
    found = torch.zeros(examples, device=accelerator.device)
    order: Any = batches.batch_sampler
    for mine, batch in zip(order.shares(), batches, strict=True):
        logits = model(**move(batch, accelerator.device)).logits.float()
        predicted = logits.squeeze(-1) if regression else logits.argmax(-1)
        found[mine] = predicted[: len(mine)].to(found.dtype)
    return accelerator.reduce(found, "sum")  # a value of one rank, zeros of the others


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
        predictions = predict(model, batches, len(labels), data.labels is None, accelerator)
        values = compute(data.metrics, labels, predictions.double().cpu().numpy(), data.positive)
        metrics.update({f"{name}{split.removeprefix('validation')}": value for name, value in values.items()})
    return metrics
