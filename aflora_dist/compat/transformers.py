"""transformers 5.3 and later."""

from __future__ import annotations

from functools import partial
from typing import Any

from .contract import Private, private

_CALLBACKS = "callbacks that are called before a checkpoint is loaded"
_trainer = partial(private, "Trainer", instead=_CALLBACKS, anywhere=True)
_config = partial(private, "PreTrainedConfig", anywhere=True)

TRAINER = [
    *_trainer("_load_from_checkpoint _prepare_for_training", "resume after a freeze, and on another engine"),
    *_trainer("_load_best_model", "go back to a model of before a freeze"),
    *_trainer("_save", "save the adapter alone where ranks hold shards"),
]
PRIVATE: list[Private] = [
    *TRAINER,
    *_config("_attn_implementation _experts_implementation", "know or set a model's attention", "public attributes"),
    *_config("_name_or_path", "know where a model was loaded from", "a public name"),
    *private("PreTrainedModel", "_no_split_modules", "know a model's blocks", "a public list of them", anywhere=True),
    *private("PreTrainedModel", "_hf_peft_config_loaded", "know that a model saves adapters", "a public query"),
]


def saves_adapters(model: Any) -> bool:
    """Whether a model has adapters by its own `add_adapter`, and so saves them."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def checkpoint_activations(model: Any, use_reentrant: bool = False) -> None:
    """Have a PreTrainedModel recompute its blocks in backward: called activation checkpointing since 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
