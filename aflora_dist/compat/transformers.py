"""transformers 5.3 and later."""

from __future__ import annotations

from typing import Any

from .contract import private

_CALLBACKS = "callbacks that are called before a checkpoint is loaded"

TRAINER = [
    *private(
        "Trainer",
        "resume after a freeze, and on another engine",
        _CALLBACKS,
        "_load_from_checkpoint",
        "_prepare_for_training",
        anywhere=True,
    ),
    *private("Trainer", "go back to a model of before a freeze", _CALLBACKS, "_load_best_model", anywhere=True),
    *private("Trainer", "save the adapter alone where ranks hold shards", _CALLBACKS, "_save", anywhere=True),
]
PRIVATE = [
    *TRAINER,
    *private(
        "PreTrainedConfig",
        "know a model's attention, or set the plainest",
        "a public attribute",
        "_attn_implementation",
        "_experts_implementation",
        anywhere=True,
    ),
    *private("PreTrainedConfig", "know where a model was loaded from", "a public name", "_name_or_path", anywhere=True),
    *private("PreTrainedModel", "know a model's blocks", "a public list of them", "_no_split_modules", anywhere=True),
    *private("PreTrainedModel", "know that a model saves adapters", "a public query", "_hf_peft_config_loaded"),
]


def saves_adapters(model: Any) -> bool:
    """Whether a model has adapters by its own `add_adapter`, and so saves them."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def checkpoint_activations(model: Any, use_reentrant: bool = False) -> None:
    """Have a PreTrainedModel recompute its blocks in backward: called activation checkpointing since 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
