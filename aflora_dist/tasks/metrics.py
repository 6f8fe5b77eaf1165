"""GLUE's metrics, computed by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Array = NDArray[np.float64]

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
