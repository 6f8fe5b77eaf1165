"""Which linear layers of a transformer are attention and which are feed-forward.

Decided by module name and architecture, never by shape: under grouped attention the key and value
projections are not square either. Does not touch the model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["attention", "ffn"]


class Architecture(NamedTuple):
    """Endings of the dotted names of a model's linear layers. Attention is looked up first."""

    attention: tuple[str, ...]
    ffn: tuple[str, ...]


_BERT = Architecture(
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("intermediate.dense", "output.dense"),
)
_LLAMA = Architecture(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_OPT = Architecture(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2"))
_T5 = Architecture(
    tuple(f"{block}.{name}" for block in ("SelfAttention", "EncDecAttention") for name in "qkvo"),
    ("DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),
)

# By the model_type of a transformers configuration. DeBERTaV3 is deberta-v2.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta": Architecture(("attention.self.in_proj", "attention.output.dense"), _BERT.ffn),
    "deberta-v2": Architecture(
        ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"),
        _BERT.ffn,
    ),
    "distilbert": Architecture(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"), ("ffn.lin1", "ffn.lin2")
    ),
    "modernbert": Architecture(("attn.Wqkv", "attn.Wo"), ("mlp.Wi", "mlp.Wo")),
    "gpt2": Architecture(
        ("attn.c_attn", "attn.c_proj", "crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"),
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": Architecture(
        ("attention.query_key_value", "attention.dense"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": Architecture(("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")),
    "opt": _OPT,
    "bart": Architecture(
        (*_OPT.attention, *(name.replace("self_attn", "encoder_attn") for name in _OPT.attention)), _OPT.ffn
    ),
    "t5": _T5,
    "mt5": _T5,
    "vit": Architecture(
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc2")
    ),
}


def target_modules(model_type: str) -> list[str]:
    """All linear layers of a known architecture's blocks, as PEFT's `target_modules`.

    Heads, poolers and embeddings are not among them.
    """
    architecture = ARCHITECTURES[model_type]
    return [*architecture.attention, *architecture.ffn]


def kind_of(model_type: str | None, module_name: str) -> Kind | None:
    """Whether the named linear layer is attention or feed-forward; None if neither or unknown."""
    if model_type not in ARCHITECTURES:
        return None
    dotted = f".{module_name}"
    architecture = ARCHITECTURES[model_type]
    if dotted.endswith(tuple(f".{ending}" for ending in architecture.attention)):
        return "attention"
    if dotted.endswith(tuple(f".{ending}" for ending in architecture.ffn)):
        return "ffn"
    return None
