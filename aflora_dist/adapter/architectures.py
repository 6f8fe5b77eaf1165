"""Which linear layers of a transformer are attention and which are feed-forward.

Decided by module name, and architecture where it is known, never by shape: under grouped attention the key and value
projections are not square either. Does not touch the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..notices import logger

Kind = Literal["attention", "ffn"]


class Architecture(NamedTuple):
    """Endings of the dotted names of a model's linear layers. Attention is looked up first.

    Attributes:
        within: The only module whose layers count, where a model has others of the same names (a vision tower).
    """

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    within: str = ""


_BERT = Architecture(
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("intermediate.dense", "output.dense"),
)
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA = Architecture(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    tuple(f"mlp.{name}" for name in _GATED),
)
_OPT = Architecture(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"), ("fc1", "fc2"))
_GPT2 = Architecture(
    ("attn.c_attn", "attn.c_proj", "crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"),
    ("mlp.c_fc", "mlp.c_proj"),
)
_GPT_NEOX = Architecture(("attention.query_key_value", "attention.dense"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
_BLOOM = Architecture(
    ("self_attention.query_key_value", "self_attention.dense"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
)
_GPTJ = Architecture(("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"), ("mlp.fc_in", "mlp.fc_out"))
_LLAMA4 = Architecture(
    _LLAMA.attention,
    tuple(f"{block}.{name}" for block in ("feed_forward", "shared_expert") for name in _GATED),
)
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
    "layoutlm": _BERT,
    "deberta": Architecture(("attention.self.in_proj", "attention.output.dense"), _BERT.ffn),
    "deberta-v2": Architecture(
        ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"),
        _BERT.ffn,
    ),
    "distilbert": Architecture(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"), ("ffn.lin1", "ffn.lin2")
    ),
    "modernbert": Architecture(("attn.Wqkv", "attn.Wo"), ("mlp.Wi", "mlp.Wo")),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "gpt_neo": Architecture(
        tuple(f"attn.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_bigcode": _GPT2,
    "btlm": Architecture(_GPT2.attention, ("mlp.c_fc", "mlp.c_fc2", "mlp.c_proj")),
    "gptj": _GPTJ,
    "codegen": Architecture(("attn.qkv_proj", "attn.out_proj"), _GPTJ.ffn),
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "RefinedWeb": _BLOOM,  # falcon's first names
    "RefinedWebModel": _BLOOM,
    "chatglm": Architecture((*_BLOOM.attention, *_GPT_NEOX.attention), _BLOOM.ffn),
    "mpt": Architecture(("attn.Wqkv", "attn.out_proj"), ("ffn.up_proj", "ffn.down_proj")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gemma4_text": _LLAMA,
    "gemma4": _LLAMA._replace(within="language_model"),
    "llama4_text": _LLAMA4,
    "llama4": _LLAMA4._replace(within="language_model"),
    "mixtral": _LLAMA,  # its experts' weights are bare parameters
    "stablelm": _LLAMA,
    "phi": Architecture(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"), ("mlp.fc1", "mlp.fc2")
    ),
    "phi3": Architecture(("self_attn.qkv_proj", "self_attn.o_proj"), ("mlp.gate_up_proj", "mlp.down_proj")),
    "opt": _OPT,
    "bart": Architecture(
        (*_OPT.attention, *(name.replace("self_attn", "encoder_attn") for name in _OPT.attention)), _OPT.ffn
    ),
    "t5": _T5,
    "mt5": _T5,
    "blip-2": Architecture((*_OPT.attention, *_T5.attention), (*_OPT.ffn, *_T5.ffn), within="language_model"),
    "nemotron_h": Architecture(
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj"),
        ("mixer.up_proj", "mixer.down_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
    ),
    "rwkv": Architecture(
        ("attention.key", "attention.value", "attention.receptance", "attention.output"),
        ("feed_forward.key", "feed_forward.value", "feed_forward.receptance"),
    ),
    "rwkv7": Architecture(("attn.r_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"), ("ffn.key", "ffn.value")),
    "vit": Architecture(
        (
            *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
            *("attention.query", "attention.key", "attention.value", "attention.output.dense"),  # older transformers
        ),
        ("mlp.fc1", "mlp.fc2", "intermediate.dense", "output.dense"),
    ),
}

# Of architectures that are not in the table: what holds the layers of attention and of feed-forward in a block, ...
_ATTENTION = {"self_attn", "attn", "attention", "self_attention", "encoder_attn", "cross_attn", "linear_attn"}
_ATTENTION |= {"SelfAttention", "EncDecAttention", "crossattention", "multi_head_attention"}
_FFN = {"mlp", "ffn", "feed_forward", "feedforward", "experts", "shared_expert", "shared_experts", "block_sparse_moe"}
_FFN |= {"moe", "DenseReluDense"}
# ... feed-forward layers that lie in the block itself, ...
_BARE_FFN = (".intermediate.dense", ".output.dense", ".fc1", ".fc2")
# ... what there chooses experts or positions, and parts that see or hear.
_CHOOSES = {"gate", "router", "shared_expert_gate", "indexer", "router_mlp"}
_OTHER_SENSES = re.compile(r"(^|\.)[^.]*(vision|visual|vqmodel|audio|image|speech|patch|connector)[^.]*\.")
_BLOCK = re.compile(r"\.\d+\.")


def kind_by_container(module_name: str) -> Kind | None:
    """Whether the named linear layer of a block is attention or feed-forward, by what holds it.

    >>> kind_by_container("model.layers.0.self_attn.q_proj"), kind_by_container("model.layers.0.mlp.gate")
    ('attention', None)
    >>> kind_by_container("model.layers.0.mlp.experts.3.w1"), kind_by_container("visual.blocks.0.mlp.fc1")
    ('ffn', None)
    """
    if not _BLOCK.search(f".{module_name}") or _OTHER_SENSES.search(module_name):
        return None
    parts = module_name.split(".")
    if _CHOOSES & {*parts}:
        return None
    for part in reversed(parts[:-1]):
        if part in _ATTENTION:
            return "attention"
        if part in _FFN:
            return "ffn"
    return "ffn" if parts[-1] == "ffn" or f".{module_name}".endswith(_BARE_FFN) else None


def targets_by_container(linear: Iterable[str]) -> dict[Kind, list[str]]:
    """The layers of attention and of feed-forward of an architecture that is not in the table, as endings of names.

    Args:
        linear: The names of all of a model's linear layers.

    Returns:
        By kind: with as few words as tell them from layers that are neither, as "self_attn.q_proj".
    """
    kinds = {name: kind_by_container(name) for name in linear}
    others = [f".{name}" for name, kind in kinds.items() if kind is None]
    found: dict[Kind, list[str]] = {"attention": [], "ffn": []}
    for name, kind in kinds.items():
        if kind is None:
            continue
        parts = name.split(".")
        fewest = 1 if parts[-2].isdigit() else 2
        endings = (".".join(parts[-words:]) for words in range(fewest, len(parts) + 1))
        ending = next(e for e in endings if not any(other.endswith(f".{e}") for other in others))
        if ending not in found[kind]:
            found[kind].append(ending)
    return found


def target_modules(model_type: str) -> list[str]:
    """Endings of the names of all linear layers of a known architecture's blocks.

    Heads, poolers and embeddings are not among them.
    """
    architecture = ARCHITECTURES[model_type]
    return [*architecture.attention, *architecture.ffn]


def default_targets(model_type: str) -> list[str] | str:
    """`target_modules` as PEFT's option of that name: a regular expression where only a part of the model counts."""
    endings, within = target_modules(model_type), ARCHITECTURES[model_type].within
    if not within:
        return endings
    return rf"(.*\.)?{within}\.(.*\.)?({'|'.join(map(re.escape, endings))})"


def kind_of(model_type: str | None, module_name: str) -> Kind | None:
    """Whether the named linear layer is attention or feed-forward; None if neither or unknown."""
    if model_type not in ARCHITECTURES:
        return kind_by_container(module_name)
    dotted = f".{module_name}"
    architecture = ARCHITECTURES[model_type]
    if architecture.within and f".{architecture.within}." not in dotted:
        return None
    if dotted.endswith(tuple(f".{ending}" for ending in architecture.attention)):
        return "attention"
    if dotted.endswith(tuple(f".{ending}" for ending in architecture.ffn)):
        return "ffn"
    return None


def find_targets(model: nn.Module, model_type: str | None) -> dict[Kind, list[str]] | None:
    """`targets_by_container` of a model whose architecture is not in the table, told in a line.

    None where not both kinds are found. A block whose experts are one bare parameter needs no feed-forward layer.
    """
    found = targets_by_container(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
    experts = any(p.dim() == 3 and ".experts." in name for name, p in model.named_parameters())
    if not found["attention"] or not (found["ffn"] or experts):
        return None
    logger.warning(
        f"the architecture {model_type or type(model).__name__!r} is not in the table of those that were tried. By "
        f"what holds them, its layers of attention are {', '.join(found['attention'])}, of feed-forward "
        f"{', '.join(found['ffn']) or 'none that can be adapted'}. Name target_modules and freezable if this is wrong."
    )
    return found
