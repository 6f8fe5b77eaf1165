"""An estimate of what a rank holds in memory at the height of a step. The formulas are in docs/plan.md.

Not counted: what CUDA and NCCL take for themselves, and what an allocator loses between its blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..names import of_base
from ..options import Config
from . import layout
from .launches import Launch
from .layout import Trained

_LOGITS_PER_CHUNK = 2**26  # of tasks/sft/loss.py on a GPU
# nf4: half a byte, and an 8-bit scale for 64 elements with a float32 one for 256 of those; int8: a scale for each row.
_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_BLOCK = re.compile(r"(.*?\.\d+)\.")
_GATES = ("gate_proj", "gate_up_proj", "wi_1", "mlp.Wi")


@dataclass(frozen=True)
class Weight:
    """A parameter that does not train, or a buffer.

    Attributes:
        itemsize: Bytes of an element in the model, quantised or not.
        block: The block of the model that it is in; empty outside of blocks.
        linear: Whether it is a float32 matrix of a linear layer that autocast casts for each use.
    """

    numel: int
    itemsize: float
    block: str
    linear: bool


@dataclass(frozen=True)
class Shape:
    """What of a transformer's configuration decides how much its activations take."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_value: int
    vocabulary: int
    gated: bool
    whole_attention: bool
    checkpointed: bool
    language_model: bool

    @classmethod
    def of(cls, model: Any, config: Config) -> Shape | None:
        """None: the configuration does not have what is needed."""
        known: Any = model.config.get_text_config()
        numbers: list[Any] = [
            getattr(known, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        ]
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            return None
        layers, hidden, heads = numbers
        groups = getattr(known, "num_key_value_heads", None) or heads
        attention = str(getattr(known, "_attn_implementation", None) or "eager")
        return cls(
            layers=layers,
            hidden=hidden,
            inner=getattr(known, "intermediate_size", None) or 4 * hidden,
            heads=heads,
            key_value=groups * (getattr(known, "head_dim", None) or hidden // heads),
            vocabulary=int(getattr(known, "vocab_size", 0)),
            gated=any(name.endswith(_GATES) for name, _ in model.named_modules()),
            whole_attention=attention == "eager",
            checkpointed=config.train.gradient_checkpointing,
            language_model=config.data.task == "sft",
        )

    def activations(self, tokens: int, length: int, itemsize: int, checkpointed: bool) -> int:
        """Bytes that autograd keeps of a micro-batch of so many tokens, in examples of `length`."""
        attention = 3 * self.heads * length * itemsize if self.whole_attention else 4 * self.heads
        each = itemsize * (8 * self.hidden + 2 * self.key_value + (4 if self.gated else 2) * self.inner) + attention
        outside = 4 * itemsize * self.hidden
        if checkpointed:
            return tokens * (self.layers * itemsize * self.hidden + each + outside)
        return tokens * (self.layers * each + outside)

    def logits(self, tokens: int, itemsize: int) -> int:
        """Bytes of a chunk of logits, as they come, in float32, and of both gradients."""
        if not self.language_model:
            return 0
        return min(tokens * self.vocabulary, max(_LOGITS_PER_CHUNK, self.vocabulary)) * (2 * itemsize + 8)


def weights_of(model: nn.Module, config: Config) -> list[Weight]:
    """All that the model holds and does not train."""
    quantized = _QUANTIZED.get(config.model.quantize or "")
    layers = [(n, m.get_base_layer() if isinstance(m, BaseTunerLayer) else m) for n, m in model.named_modules()]
    matrices = {id(m.weight): n for n, m in layers if isinstance(m, nn.Linear)}
    found = []
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.requires_grad:
            continue
        inside = _BLOCK.match(of_base(name))
        block, linear = inside[1] if inside else "", id(parameter) in matrices
        itemsize = quantized if quantized and linear and block else float(parameter.element_size())
        found.append(Weight(parameter.numel(), itemsize, block, linear and parameter.dtype == torch.float32))
    return found


def micro_batch_tokens(config: Config, launch: Launch, tokens: int, micro_batches: int) -> int:
    """The most tokens that a micro-batch is likely to have: a share of the update's examples, none over its length."""
    examples = -(-config.train.batch_size // (launch.num_processes * micro_batches))
    return min(max(tokens, config.data.max_length), examples * config.data.max_length)


def estimate(
    launch: Launch,
    weights: Sequence[Weight],
    trained: Trained,
    shape: Shape | None,
    tokens: int,
    length: int,
) -> dict[str, int | None]:
    """Bytes by what they are for, on the rank that has most, before the first freeze.

    Args:
        tokens: Of a micro-batch.
        length: Tokens of an example.

    Returns:
        `activations` is None, and `total` without it, for a model whose configuration is not understood.
    """
    engine, ranks = launch.engine, launch.num_processes
    zero, sharded = engine.startswith("zero"), engine in ("zero3", "fsdp2")
    half = launch.half

    def size(itemsize: float) -> float:  # DeepSpeed holds the model in one dtype, what is quantised apart
        return (2.0 if half else 4.0) if zero and itemsize >= 2 else itemsize

    frozen = sum(w.numel * size(w.itemsize) for w in weights)
    trains, share = int((trained.numels * (2 if zero and half else trained.itemsizes)).sum()), 1 / ranks
    held_half = not zero and any(w.itemsize == 2 and w.linear is False and w.block for w in weights)
    compute = 2 if half or held_half else 4
    parts: dict[str, float | None] = {
        "weights": frozen * share if sharded else frozen,
        "trained": trains * share if sharded else trains,
        "gradients": _gradients(launch, trains),
        "optimizer": float(
            (layout.moment_bytes(engine, trained, ranks) + layout.master_bytes(engine, trained, ranks)).max(initial=0)
        ),
        "scores": float(layout.score_bytes(engine, trained, ranks).max(initial=0)),
        "gathered": _gathered(launch, weights, trained, compute),
        "buffers": float(2 * launch.reduce_bucket * compute) if zero else 0.0,
        "casts": _casts(launch, weights, shape),
        "activations": shape.activations(tokens, length, compute, shape.checkpointed) if shape else None,
        "logits": shape.logits(tokens, compute) if shape else None,
    }
    on_cpu = {"optimizer"} if launch.offloaded_optimizer else set()
    on_cpu |= {"weights", "trained"} if launch.offloaded_weights else set()
    total = sum(number for part, number in parts.items() if number is not None and part not in on_cpu)
    rounded = {part: None if number is None else round(number) for part, number in parts.items()}
    other = shape.activations(tokens, length, compute, not shape.checkpointed) if shape else None
    return {**rounded, "total": round(total), "activations_otherwise": other}


def _gradients(launch: Launch, trains: int) -> float:
    share = trains / launch.num_processes
    return {"ddp": 2.0 * trains, "zero1": trains + share, "zero2": share, "zero3": share, "fsdp2": share}.get(
        launch.engine, float(trains)
    )


def _gathered(launch: Launch, weights: Sequence[Weight], trained: Trained, compute: int) -> float:
    """Whole weights at a time, where they are sharded."""
    if launch.engine == "zero3":
        everything = sum(w.numel for w in weights) + int(trained.numels.sum())
        return float(min(everything, launch.live_parameters) * compute)
    if launch.engine == "fsdp2":  # a block while the next one arrives, and all that is in no block
        blocks: dict[str, int] = defaultdict(int)
        for weight in weights:
            blocks[weight.block] += weight.numel
        outside = blocks.pop("", 0)
        return float((outside + 2 * max(blocks.values(), default=0)) * compute)
    return 0.0


def _casts(launch: Launch, weights: Sequence[Weight], shape: Shape | None) -> float:
    """Autocast's 16-bit copies of float32 weights, kept for the backward; of one block with gradient checkpointing."""
    if not launch.half or launch.engine not in ("single", "ddp"):
        return 0.0
    blocks: dict[str, int] = defaultdict(int)
    for weight in weights:
        blocks[weight.block] += weight.numel if weight.linear else 0
    one = shape is not None and shape.checkpointed
    return 2.0 * (max(blocks.values(), default=0) if one else sum(blocks.values()))
