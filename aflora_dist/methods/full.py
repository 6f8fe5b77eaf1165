"""Full fine-tuning as a method of `aflora train`: every parameter trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.precision import widen
from ..adapter.saving import state_dict_of
from ..errors import AFLoRAError
from ..options import Config
from .base import FreezingMethod


class Full(FreezingMethod):
    """The whole model; what is saved is a model's folder, for from_pretrained of transformers."""

    name = "full"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.model.quantize is not None:
            raise AFLoRAError(
                f"method.name=full trains the weights that model.quantize={config.model.quantize} holds in a few bits. "
                f"Drop model.quantize, or name another method (method.name=lora)."
            )
        if config.model.dtype in ("bfloat16", "float16"):
            raise AFLoRAError(
                f"model.dtype={config.model.dtype} is what frozen weights are held in, and method.name=full has none: "
                f"what trains has float32 values. Leave it out, and compute in half precision by --mixed_precision."
            )
        self._head: tuple[str, ...] = ()

    def adapt(self, model: Any, head: Sequence[str]) -> Any:
        self._head = tuple(f"{name}." for name in head)
        widen(model.requires_grad_(True), model.parameters())
        return model

    def is_head(self, name: str) -> bool:
        return name.startswith(self._head)

    def saved(self, name: str, trains: bool) -> bool:
        return True

    def save(self, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
        model.save_pretrained(str(folder), state_dict=state_dict_of(model, values))
