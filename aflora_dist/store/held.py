"""New modules that do not train: what they are was drawn at random, and must survive a restart like what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import AFLoRAError

if TYPE_CHECKING:  # who reads results needs no torch
    from torch import Tensor

    from ..engines import Engine

_PREFIX = "held/"


class Held:
    """Values of some of the engine's parameters that stay as they are, as a part of the training's state."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self.engine, self.names = engine, list(names)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = self.engine.gather(self.names)
        return {_PREFIX + name: value.clone() for name, value in values.items()}, {"names": self.names}

    def check(self, record: Mapping[str, Any]) -> None:
        if record["names"] != self.names:
            raise AFLoRAError(
                f"The checkpoint was trained with another model.train_new: there {len(record['names'])} parameters of "
                f"new modules kept their random start, here {len(self.names)}. Choose the same."
            )

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        values = {name: tensors[_PREFIX + name] for name in self.names if _PREFIX + name in tensors}
        self.engine.assign(values, self.names)
