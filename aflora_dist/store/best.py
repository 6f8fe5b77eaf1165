"""The best evaluation's adapter, kept while a training goes on, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import AFLoRAError

if TYPE_CHECKING:  # who reads results needs no torch
    from torch import Tensor

LOWER_IS_BETTER = ("loss", "perplexity")
_PREFIX = "best/"


class BestEpoch:
    """Keeps what the adapter was at the evaluation with the best value of one metric; of equals, the first.

    A part of the training's state (`Progress.parts`): each checkpoint holds the best adapter up to there, so that it
    survives a restart, from whichever checkpoint, to the bit. It lies in the CPU memory of the main process.

    Args:
        metric: As result.json names it.
        patience: Evaluations without improvement after which to stop; None: never.
        gather: Gives the adapter as it is now, whole, on the main process. A collective.
    """

    def __init__(self, metric: str, patience: int | None, gather: Callable[[], dict[str, Tensor]]) -> None:
        self.metric, self.patience = metric, patience
        self._gather = gather
        self.epoch: int | None = None  # the best evaluation, one after each epoch or run.eval_every; counted from 1
        self.value: float | None = None
        self.waited = 0
        self.adapter: dict[str, Tensor] = {}

    def evaluated(self, number: int, metrics: Mapping[str, float]) -> None:
        """Keep the adapter if this evaluation, counted from 1, is the best so far. A collective."""
        value = metrics[self.metric]
        if not _better(self.metric, value, self.value):
            self.waited += 1
            return
        self.epoch, self.value, self.waited = number, value, 0
        # On a CPU what was gathered may be the very weights that go on training.
        self.adapter = {name: tensor.clone() for name, tensor in self._gather().items()}

    @property
    def exhausted(self) -> bool:
        """Whether there have been `patience` evaluations since the best one."""
        return self.patience is not None and self.waited >= self.patience

    # -- a part of the training's state ----------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        record = {"metric": self.metric, "epoch": self.epoch, "value": self.value, "waited": self.waited}
        return {_PREFIX + name: tensor for name, tensor in self.adapter.items()}, record

    def check(self, record: Mapping[str, Any]) -> None:
        if record["metric"] != self.metric:
            raise AFLoRAError(
                f"The checkpoint holds the best epoch by run.keep_best={record['metric']}; here run.keep_best="
                f"{self.metric}. Choose the same."
            )

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.epoch, self.value, self.waited = record["epoch"], record["value"], record["waited"]
        self.adapter = {
            name.removeprefix(_PREFIX): tensors[name].clone() for name in tensors if name.startswith(_PREFIX)
        }


def check_metric(metric: str | None, known: Sequence[str]) -> None:
    """Raise an AFLoRAError, with what is measured, unless the task measures this metric."""
    if metric is not None and metric not in known:
        raise AFLoRAError(f"run.keep_best={metric} is not measured here. Measured are: {', '.join(known)}.")


def _better(metric: str, value: float, than: float | None) -> bool:
    if than is None or math.isnan(than):
        return than is None or not math.isnan(value)
    return value < than if metric in LOWER_IS_BETTER else value > than
