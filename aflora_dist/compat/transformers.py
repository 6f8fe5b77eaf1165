"""transformers 5.3 and later."""

from __future__ import annotations

from typing import Any


def checkpoint_activations(model: Any, use_reentrant: bool = False) -> None:
    """Have a PreTrainedModel recompute its blocks in backward: called activation checkpointing since 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
