"""A drop of nothing and a snapshot restored, before training: what would break at a first freeze breaks here."""

from __future__ import annotations

import torch

from ..compat.contract import broken
from ..errors import AFLoRAError
from .base import Engine


def rehearse(engine: Engine, name: str) -> None:
    """Go through the motions of a freeze and of a checkpoint with one small parameter. A collective.

    Args:
        name: A trainable parameter; it is the same to the bit afterwards, as is everything else.

    Raises:
        UnsupportedEngineError: A library's private interface does something else than it did; names the release to use.
    """
    library = "deepspeed" if engine.kind.startswith("zero") else "torch"
    trained = engine.trainable
    try:
        before, record = engine.snapshot([name])
        engine.drop([])
        engine.end_backward_at(None)
        engine.load(before, record)
        after, _ = engine.snapshot([name])
    except AFLoRAError:
        raise
    except Exception as error:
        raise broken(library, "Dropping parameters from the optimizer, or restoring them", error) from error
    same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if not same or engine.trainable != trained:
        raise broken(library, "Restoring the optimizer", ValueError("its state is not the same afterwards"))
