"""accelerate 1.12 and later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState

from .contract import private

ACCELERATOR = [
    *private("Accelerator", "find the wrapper that knows of skipped updates", "a public list of them", "_optimizers"),
    *private(
        "Accelerator", "number the state of several models as accelerate does", "a public list of them", "_models"
    ),
    *private("Accelerator", "know whether DeepSpeed's schedule was asked for", "a public list of them", "_schedulers"),
]
PRIVATE = [
    *ACCELERATOR,
    *private("PartialState", "know whether there is one, without making one", "a public query", "_shared_state"),
]


def has_state() -> bool:
    """Whether an Accelerator, or a PartialState, has been made in this process."""
    return bool(PartialState._shared_state)


def optimizers(accelerator: Accelerator) -> Sequence[Any]:
    """The optimizers that `prepare` has returned."""
    return accelerator._optimizers


def models(accelerator: Accelerator) -> Sequence[Any]:
    """The models that `prepare` has returned."""
    return accelerator._models


def schedulers(accelerator: Accelerator) -> Sequence[Any]:
    """The schedulers that `prepare` has returned."""
    return accelerator._schedulers
