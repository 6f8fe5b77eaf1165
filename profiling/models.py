"""Models to measure: any hub id or folder, or built-in shapes without weights."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

# name -> (model_type, configuration). Shapes are those of the models they are named after.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta-v3-base": (
        "deberta-v2",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "vocab_size": 128100,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "max_relative_positions": -1,
        },
    ),
    "bert-base": ("bert", {}),
    "llama-7b": (
        "llama",
        {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    ),
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 128256,
        },
    ),
    "llama-small": (
        "llama",
        {
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 1408,
            "vocab_size": 8000,
        },
    ),
}


def build(name: str, layers: int | None) -> nn.Module:
    """A sequence classifier, frozen, without dropout.

    Args:
        name: A key of `SHAPES` (random weights), a hub id, or a folder.
        layers: Keep only that many layers of a built-in shape.

    Raises:
        SystemExit: The model cannot be had; the message says why.
    """
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}
    if name in SHAPES:
        model_type, options = SHAPES[name]
        if layers is not None:
            options = {**options, "num_hidden_layers": layers}
        config = AutoConfig.for_model(model_type, **options, **off, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        if layers is not None:
            raise SystemExit("--layers goes with a built-in shape; a loaded model keeps its layers.")
        try:
            model = AutoModelForSequenceClassification.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(f"{name!r} is neither one of {', '.join(SHAPES)} nor to be loaded: {reason}") from None
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.pad_token_id = 0
    return model.requires_grad_(False)
