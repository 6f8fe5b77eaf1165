"""Evaluation: every example once, on any number of ranks, the results in the data's order, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..options import DataConfig
from .batches import Batch, move
from .data import Data
from .glue import metric_names
from .reading import listed
from .sources import trained_too

Array = NDArray[np.float64]


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


def evaluate(
    model: nn.Module, splits: dict[str, DataLoader[Batch]], data: Data, accelerator: Accelerator
) -> dict[str, float]:
    """The task's metrics, named as `metric_names` says. A collective."""
    metrics: dict[str, float] = {}
    for split, batches in splits.items():
        labels = np.asarray(data.evaluation[split]["label"][:], dtype=np.float64)
        width = 1 if data.labels is None else len(data.labels)
        logits = gather_logits(model, batches, len(labels), width, accelerator)
        predictions = logits.squeeze(-1) if data.labels is None else logits.argmax(-1)
        values = compute(data.metrics, labels, predictions.double().cpu().numpy(), data.positive)
        metrics.update(zip(metric_names([split], values), values.values(), strict=True))
    return metrics


METRICS: dict[str, Callable[[Array, Array, int], float]] = {
    "accuracy": lambda labels, predictions, _: accuracy_score(labels, predictions),
    "f1": lambda labels, predictions, positive: f1_score(
        labels == positive, predictions == positive, zero_division=0.0
    ),
    "matthews_correlation": lambda labels, predictions, _: matthews_corrcoef(labels, predictions),
    "pearson": lambda labels, predictions, _: _pearson(labels, predictions),
}


def _pearson(labels: Array, predictions: Array) -> float:
    # Undefined where one side is constant, as at the start of a regression: no correlation then.
    if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return pearsonr(labels, predictions).statistic


def compute(names: Sequence[str], labels: Array, predictions: Array, positive: int = 1) -> dict[str, float]:
    """The named metrics of predictions (class numbers or values), both (examples,); F1 is that of class `positive`."""
    return {name: float(METRICS[name](labels, predictions, positive)) for name in names}
