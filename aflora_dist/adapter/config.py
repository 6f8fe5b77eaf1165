"""The adapter's configuration, as PEFT stores it beside the weights (adapter_config.json)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from peft.config import PeftConfig

from ..errors import AFLoRAError


class AFLoRAPeftType(StrEnum):
    """PEFT's enum of methods cannot be extended; a str enum of our own serves where it looks a type up."""

    AFLORA = "AFLORA"


@dataclass
class AFLoRAConfig(PeftConfig):
    """Configuration of an AFLoRA adapter (Eq. 1 of the paper).

    Args:
        r: Rank of the projection matrices A (r, in) and B (out, r). The paper uses 4.
        target_modules: Linear or Conv1D layers to adapt: a list of name endings or one regular
            expression, as in PEFT. None adapts all attention and feed-forward layers of an
            architecture that this package knows.
        exclude_modules: Layers to leave alone, written like `target_modules`.
        freezable: Whose projection matrices train and then freeze: "ffn" (Table 3's best row),
            "attention", "all", "none", or a regular expression that matches whole module names. The
            matrices of all other adapted layers stay at their random start; their vectors train.
        freezing: "adaptive" freezes by score while training (this needs an `AdaptiveFreezing`);
            "never" trains the freezable matrices to the end and "always" keeps them at their
            random start (Table 2's other two rows).
        d_initial: Start of every element of s_d. s_b starts at 0, so the adapted model starts out
            equal to the base model.
        aflora_dropout: Probability of dropping an element of the adapter's input while training.
        bias: Which biases train: "none", "all" or "aflora_only" (those of the adapted layers).
        modules_to_save: Modules that train whole and are saved with the adapter, such as a
            classification head.
        layers_to_transform: Indices of the layers to adapt; None for all.
        layers_pattern: Name of the list of layers, for `layers_to_transform`, where it is unusual.
        init_weights: Initialise the adapter; False leaves memory as it is, for loading.

    Raises:
        AFLoRAError: An argument is out of its range; the message says what to write.
    """

    r: int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    freezable: str = "ffn"
    freezing: Literal["adaptive", "never", "always"] = "adaptive"
    d_initial: float = 0.1
    aflora_dropout: float = 0.0
    bias: Literal["none", "all", "aflora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AFLoRAPeftType.AFLORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))  # PEFT's own tuners hold sets
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r <= 0:
            raise AFLoRAError(f"AFLoRAConfig: the rank r must be a positive integer, got r={self.r!r}.")
        if not 0.0 <= self.aflora_dropout < 1.0:
            raise AFLoRAError(f"AFLoRAConfig: aflora_dropout must lie in [0, 1), got {self.aflora_dropout!r}.")
        if self.freezing not in ("adaptive", "never", "always"):
            raise AFLoRAError(f'AFLoRAConfig: freezing must be "adaptive", "never" or "always", got {self.freezing!r}.')
        if self.bias not in ("none", "all", "aflora_only"):
            raise AFLoRAError(f'AFLoRAConfig: bias must be "none", "all" or "aflora_only", got {self.bias!r}.')
        if self.layers_pattern and self.layers_to_transform is None:
            raise AFLoRAError("AFLoRAConfig: layers_pattern has no effect without layers_to_transform.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise AFLoRAError(
                "AFLoRAConfig: layers_to_transform needs target_modules as a list (or None); a regular expression can "
                "choose the layers itself."
            )
        try:
            re.compile(self.freezable)
        except (re.error, TypeError) as error:
            raise AFLoRAError(
                f'AFLoRAConfig: freezable must be "ffn", "attention", "all", "none" or a regular expression '
                f"that matches module names; {self.freezable!r} does not compile: {error}."
            ) from None
