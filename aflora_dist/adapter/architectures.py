"""Which linear layers of a transformer are attention and which are feed-forward.

Decided by what holds a layer in its block, by name and never by shape: under grouped attention the key and value
projections are not square either. Does not touch the model.
"""

from __future__ import annotations

import re
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..notices import logger

Kind = Literal["attention", "ffn"]

# By the model_type of a transformers configuration: whose layers tests/adapter/test_architectures.py has counted. Of
# others a line says what was found. DeBERTaV3 is deberta-v2; RefinedWeb is falcon's first name.
TRIED = {
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "layoutlm", "deberta", "deberta-v2", "distilbert"),
    *("modernbert", "gpt2", "gpt_neox", "gpt_neo", "gpt_bigcode", "btlm", "gptj", "codegen", "bloom", "falcon"),
    *("RefinedWeb", "RefinedWebModel", "chatglm", "mpt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3_text", "gemma4_text", "gemma4", "llama4_text", "llama4", "mixtral", "stablelm", "phi", "phi3", "opt"),
    *("bart", "t5", "mt5", "blip-2", "nemotron_h", "rwkv", "rwkv7", "vit"),
}
# What holds the layers of attention and of feed-forward in a block, ...
_ATTENTION = {"self_attn", "attn", "attention", "self_attention", "encoder_attn", "cross_attn", "linear_attn"}
_ATTENTION |= {"SelfAttention", "EncDecAttention", "crossattention", "multi_head_attention"}
_ATTENTION |= {"multihead_attn"}
_FFN = {"mlp", "ffn", "feed_forward", "feedforward", "experts", "shared_expert", "shared_experts", "block_sparse_moe"}
_FFN |= {"moe", "DenseReluDense"}
# ... feed-forward layers that lie in the block itself (linear1 and linear2 in torch's own), and layers of a `mixer`,
# which is one thing or the other, ...
_BARE_FFN = (".intermediate.dense", ".output.dense", ".fc1", ".fc2", ".linear1", ".linear2")
_MIXER: dict[str, Kind] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention")
_MIXER |= {"up_proj": "ffn", "down_proj": "ffn"}
# ... what there chooses experts or positions, and parts that see or hear.
_CHOOSES = {"gate", "router", "shared_expert_gate", "indexer", "router_mlp"}
_OTHER_SENSES = re.compile(r"(^|\.)[^.]*(vision|visual|vqmodel|audio|image|speech|patch|connector|qformer)[^.]*\.")
_BLOCK = re.compile(r"\.\d+\.")


def kind_of(module_name: str) -> Kind | None:
    """Whether the named linear layer is attention or feed-forward; None if neither.

    >>> kind_of("model.layers.0.self_attn.q_proj"), kind_of("model.layers.0.mlp.gate")
    ('attention', None)
    >>> kind_of("model.layers.0.mlp.experts.3.w1"), kind_of("visual.blocks.0.mlp.fc1")
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
        if part == "mixer":
            return _MIXER.get(parts[-1])
    return "ffn" if parts[-1] == "ffn" or f".{module_name}".endswith(_BARE_FFN) else None


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers, quantised ones included, but for what trains whole (`modules_to_save`).

    Where one is adapted, that of what is around it. Not the layer in torch's own attention, which is never called.
    """
    found: list[str] = []
    around: tuple[str, ...] = ()
    for name, module in model.named_modules():  # parents come first
        if name.startswith(around):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper, nn.MultiheadAttention)):
            around = (*around, f"{name}.")
        linear = isinstance(module, (BaseTunerLayer, Conv1D)) or hasattr(module, "in_features")
        if linear and not isinstance(module, AuxiliaryTrainingWrapper):
            found.append(name)
    return found


def find_targets(model: nn.Module) -> dict[Kind, list[str]] | None:
    """The layers of attention and of feed-forward, as endings of names; heads, poolers and embeddings are none.

    Of an architecture that was not tried a line says what was found.

    Returns:
        By kind: with as few words as tell them from layers that are neither, as "self_attn.q_proj". None where not both
        kinds are found; but a block whose experts are one bare parameter needs no feed-forward layer.
    """
    kinds = {name: kind for name in linear_layers(model) if (kind := kind_of(name)) is not None}
    others = [f".{name}" for name, _ in model.named_modules() if name not in kinds]
    found: dict[Kind, list[str]] = {"attention": [], "ffn": []}
    for name, kind in kinds.items():
        parts = name.split(".")
        fewest = 1 if parts[-2].isdigit() else 2
        endings = [".".join(parts[-words:]) for words in range(fewest, len(parts) + 1)]
        if not {*endings} & {*found[kind]}:
            found[kind].append(next(e for e in endings if not any(other.endswith(f".{e}") for other in others)))
    experts = any(p.dim() == 3 and ".experts." in name for name, p in model.named_parameters())
    if not found["attention"] or not (found["ffn"] or experts):
        return None
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in TRIED:
        logger.warning(
            f"the architecture {model_type or type(model).__name__!r} is not among those that were tried. By what "
            f"holds them, its layers of attention are {', '.join(found['attention'])}, of feed-forward "
            f"{', '.join(found['ffn']) or 'none that can be adapted'}. Name target_modules and freezable if this is "
            f"wrong."
        )
    return found


def target_modules(model: nn.Module) -> list[str]:
    """`find_targets` of both kinds, each ending once; none where nothing is found."""
    return sorted({ending for endings in (find_targets(model) or {}).values() for ending in endings})


def outside_body(model: nn.Module) -> list[str]:
    """The parts of a model with a head that are not its body: classifier, DeBERTa's pooler, BART's classification_head.

    PEFT knows of those that are called classifier or score. The others are not in the checkpoint of a body, either:
    they start at random, and would be other ones wherever the adapter is loaded, unless they train and are saved.
    """
    body = getattr(model, "base_model_prefix", "")
    if not body or not hasattr(model, body):
        return []
    return [name for name, part in model.named_children() if name != body and next(part.parameters(), None) is not None]
