"""The adapter's configuration, as PEFT stores it beside the weights (adapter_config.json)."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft.config import PeftConfig

from ..errors import AFLoRAError
from ..options.checked import AT_LEAST_ONE, DECAY, check_options

T = TypeVar("T")


class AFLoRAPeftType(str, Enum):  # noqa: UP042  # PEFT prints a type and cuts at the dot, which a StrEnum lacks
    """PEFT's enum of methods cannot be extended; a str enum of our own serves where it looks a type up."""

    AFLORA = "AFLORA"


# What other methods of PEFT have, and why not this one.
_UNSUPPORTED = {
    "rank_pattern": "all layers of an adapter have one rank r",
    "alpha_pattern": "s_b and s_d, which are learned, do the scaling",
    "lora_alpha": "s_b and s_d, which are learned, do the scaling",
    "use_rslora": "s_b and s_d, which are learned, do the scaling",
    "lora_dropout": "it is called aflora_dropout",
    "init_lora_weights": "it is called init_weights",
    "ensure_weight_tying": "adapters of tied layers cannot be tied: leave the embedding and the output layer out of "
    "target_modules and modules_to_save, or untie them first",
    "target_parameters": "it adapts Linear and Conv1D layers, not bare parameters such as the experts' weights of a "
    "mixture of experts: name the layers around them in target_modules (attention, shared experts)",
    "trainable_token_indices": "single tokens cannot be trained: name the embedding in modules_to_save",
}
_CARD = """
## Loading this adapter

PEFT knows AFLoRA once the package `aflora_dist` is imported:

```python
import aflora_dist  # before the adapter is loaded; without it PEFT says KeyError: 'AFLORA'
```
"""


def _explaining(cls: type[T]) -> type[T]:
    """Say of what other methods have why this one has not, where a dataclass would only say "unexpected"."""
    init: Any = cls.__init__

    @wraps(init)  # and so with its signature
    def explain(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() & _UNSUPPORTED.keys():
            raise AFLoRAError(f"AFLoRAConfig has no {name}: {_UNSUPPORTED[name]}.")
        init(self, *args, **kwargs)

    def explain_missing(self: Any, name: str) -> Any:
        reason = _UNSUPPORTED.get(name)
        raise AttributeError(f"{cls.__name__} has no {name}" + (f": {reason}." if reason else "."))

    cls.__init__ = explain  # type: ignore[assignment]
    cls.__getattr__ = explain_missing  # type: ignore[attr-defined]  # of what is not there
    return cls


@_explaining
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
        init_weights: Start out equal to the base model. False draws s_b at random, for tests.
        import_first: Nothing to set. Tells who reads adapter_config.json what has to be imported before PEFT can load
            the adapter.

    Raises:
        AFLoRAError: An argument is out of its range; the message says what to write.
    """

    r: int = field(default=4, metadata=AT_LEAST_ONE)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    freezable: str = "ffn"
    freezing: Literal["adaptive", "never", "always"] = "adaptive"
    d_initial: float = 0.1
    aflora_dropout: float = field(default=0.0, metadata=DECAY)
    bias: Literal["none", "all", "aflora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = field(default=True)
    import_first: str = "aflora_dist"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AFLoRAPeftType.AFLORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))  # PEFT's own tuners hold sets
        check_options(self, "AFLoRAConfig: ")
        if self.d_initial == 0 and self.init_weights:
            raise AFLoRAError(
                "AFLoRAConfig: d_initial=0 beside s_b, which starts at 0, gives Eq. 1 no gradient at all, and nothing "
                "would ever train. Take another number; the paper's is 0.1."
            )
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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT has it; a model card in the folder, or in that of the adapter's model, tells how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        for card in (folder / "README.md", folder.parent / "README.md"):
            with suppress(OSError, UnicodeError):  # somebody else's: no reason to save no adapter
                text = card.read_text(encoding="utf-8") if card.is_file() else ""
                if "library_name: peft" in text:
                    if "import aflora_dist" not in text:
                        card.write_text(text.rstrip() + "\n" + _CARD, encoding="utf-8")
                    return
