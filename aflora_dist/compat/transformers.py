"""transformers 5.3 and later."""

from __future__ import annotations

import inspect
from functools import partial
from types import FrameType
from typing import Any

import transformers

from ..errors import AFLoRAError
from .contract import Private, is_older, private

_LOADING = "transformers.integrations.peft"

_CALLBACKS = "callbacks that are called before a checkpoint is loaded"
_trainer = partial(private, "Trainer", instead=_CALLBACKS, anywhere=True)
_config = partial(private, "PreTrainedConfig", anywhere=True)

TRAINER = [
    *_trainer("_load_from_checkpoint _prepare_for_training", "resume after a freeze, and on another engine"),
    *_trainer("_load_best_model", "go back to a model of before a freeze"),
    *_trainer("_save_rng_state", "complete a checkpoint before earlier ones are deleted"),
    *_trainer("_save", "save the adapter alone where ranks hold shards"),
]
PRIVATE: list[Private] = [
    *TRAINER,
    *_config("_attn_implementation _experts_implementation", "know or set a model's attention", "public attributes"),
    *_config("_name_or_path", "know where a model was loaded from", "a public name"),
    *private("PreTrainedModel", "_no_split_modules", "know a model's blocks", "a public list of them", anywhere=True),
    *private(
        "PreTrainedModel",
        "_gradient_checkpointing_func",
        "know how activations are recomputed",
        "a public query",
        anywhere=True,
    ),
    *private("PreTrainedModel", "_hf_peft_config_loaded", "know that a model saves adapters", "a public query"),
]


def saves_adapters(model: Any) -> bool:
    """Whether a model has adapters by its own `add_adapter`, and so saves them."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def checkpoint_activations(model: Any, use_reentrant: bool = False) -> None:
    """Have a PreTrainedModel recompute its blocks in backward: called activation checkpointing since 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def recomputes_reentrantly(model: Any) -> bool:
    """Whether a model recomputes its blocks in backward, and by torch's older, reentrant kind."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            return bool(getattr(function, "keywords", {}).get("use_reentrant", False))
    return False


def unpacked_gguf() -> dict[str, Any]:
    """What tells from_pretrained to unpack a GGUF file's weights, where it knows how not to.

    Untold it may leave them packed, and a model that it unpacked all the same counts as one that cannot be saved.
    """
    found = getattr(transformers, "GgufConfig", None)
    return {} if found is None else {"quantization_config": found(dequantize=True)}


def refuse_own_loading() -> None:
    """Raise an AFLoRAError where a model's own load_adapter() would not give an adapter all of its values.

    Until 5.5 it knows few names (those under `model.`), until 5.17 no `modules_to_save`, whichever the method: what it
    does not know stays as it was drawn, and a table of names in the log tells so.
    """
    if not is_older("transformers", "5.18"):
        return
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "load_adapter" and frame.f_globals.get("__name__") == _LOADING:
            raise AFLoRAError(
                "A model's own load_adapter() and from_pretrained() leave values of an adapter at random before "
                "transformers 5.18. Load it with PeftModel.from_pretrained(model, folder), or install that release."
            )
        frame = frame.f_back
