"""Which linear layers of a transformer are attention and which are feed-forward.

Decided by module name and architecture, never by shape: under grouped attention the key and value
projections are not square either. Does not touch the model.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["attention", "ffn"]

# model_type -> (attention, feed-forward): patterns for the end of a module's dotted name.
_BERT = (r"attention\.self\.(query|key|value)|attention\.output\.dense", r"intermediate\.dense|(?<!attention\.)output\.dense")
_DEBERTA = (
    r"attention\.self\.(query_proj|key_proj|value_proj|in_proj)|attention\.output\.dense",
    _BERT[1],
)
_LLAMA = (r"self_attn\.(q_proj|k_proj|v_proj|o_proj)", r"mlp\.(gate_proj|up_proj|down_proj)")
_OPT = (r"self_attn\.(q_proj|k_proj|v_proj|out_proj)", r"fc1|fc2")
_BART = (r"(self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)", r"fc1|fc2")
_T5 = (r"(SelfAttention|EncDecAttention)\.(q|k|v|o)", r"DenseReluDense\.(wi|wi_0|wi_1|wo)")

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,  # DeBERTaV3 as well: its model_type is deberta-v2
    "distilbert": (r"attention\.(q_lin|k_lin|v_lin|out_lin)", r"ffn\.(lin1|lin2)"),
    "modernbert": (r"attn\.(Wqkv|Wo)", r"mlp\.(Wi|Wo)"),
    "gpt2": (r"attn\.(c_attn|c_proj)|crossattention\.(c_attn|q_attn|c_proj)", r"mlp\.(c_fc|c_proj)"),
    "gpt_neox": (r"attention\.(query_key_value|dense)", r"mlp\.(dense_h_to_4h|dense_4h_to_h)"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": (r"self_attn\.(qkv_proj|o_proj)", r"mlp\.(gate_up_proj|down_proj)"),
    "opt": _OPT,
    "bart": _BART,
    "t5": _T5,
    "mt5": _T5,
    # The second spelling of each is that of transformers 4.
    "vit": (
        r"attention\.(q_proj|k_proj|v_proj|o_proj)|attention\.attention\.(query|key|value)|attention\.output\.dense",
        r"mlp\.(fc1|fc2)|intermediate\.dense|(?<!attention\.)output\.dense",
    ),
}


def target_pattern(model_type: str) -> str:
    """All linear layers of a known architecture's blocks, as PEFT's `target_modules` expression.

    Heads, poolers and embeddings are not targets.
    """
    attention, ffn = ARCHITECTURES[model_type]
    return rf"(.*\.)?({attention}|{ffn})"


def kind_of(model_type: str | None, module_name: str) -> Kind | None:
    """Whether the named linear layer is attention or feed-forward; None if neither or unknown."""
    if model_type not in ARCHITECTURES:
        return None
    attention, ffn = ARCHITECTURES[model_type]
    if re.fullmatch(rf"(.*\.)?({attention})", module_name):
        return "attention"
    if re.fullmatch(rf"(.*\.)?({ffn})", module_name):
        return "ffn"
    return None
