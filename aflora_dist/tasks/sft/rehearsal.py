"""What the loss takes for granted of a language model, tried on a few tokens before time is spent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from ...errors import AFLoRAError
from ..batches import Batch
from ..model import unadapted
from .batching import IGNORED, Collator

_SAMPLED = 128  # tokens of an example: the model's own loss holds all logits


def beginnings(examples: datasets.Dataset, collate: Collator) -> Batch:
    """The beginnings of an example and of a shorter one, all of whose tokens carry loss; the same on every rank."""
    few = [row[:_SAMPLED] for row in examples[:16]["input_ids"]]
    return collate([{"input_ids": row, "labels": row} for row in (max(few, key=len), min(few, key=len))])


def check_kind(model: Any) -> None:
    """Raise AFLoRAError for encoders, which no causal mask keeps from seeing what comes: known without weights."""
    masks = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    if getattr(model.config, "is_decoder", None) is False and masks == {False}:
        raise _sees_the_future(model)


@torch.no_grad()
def check_own_loss(
    model: nn.Module, base: Any, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor], tolerance: float
) -> None:
    """Hold the task's loss of a batch against the model's own. A collective on sharded engines.

    Args:
        model: As it was prepared.
        base: The model in it, without adapter.

    Raises:
        AFLoRAError: The model's is another one, such as one with a term for its experts.
    """
    if "labels" not in inspect.signature(base.forward).parameters:
        return
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels.view(-1)[batch["positions"] + 1] = batch["targets"]
    inputs = {name: value for name, value in batch.items() if name not in ("positions", "targets")}
    own = model(**inputs, labels=labels, use_cache=False).loss
    ours = loss(model, batch) / len(batch["targets"])
    if own is not None and not torch.allclose(own.float(), ours.float(), rtol=tolerance, atol=tolerance):
        raise AFLoRAError(
            f"{type(base).__name__} computes a loss of {own.item():.4f} where the cross entropy of the tokens is "
            f"{ours.item():.4f}: it adds a term, weighs tokens or shifts labels otherwise, and would not be trained as "
            f"it is meant to be. Switch that off in its config.json (output_router_logits=false, say), or use another "
            f"model."
        )


def check_no_future(model: nn.Module, base: Any, tokens: Tensor, tolerance: float) -> None:
    """See that what the model says depends on nothing that comes later. A collective on sharded engines.

    Args:
        tokens: (1, length).
        tolerance: Relative to the largest logit. (An untrained encoder differs by little.)

    Raises:
        AFLoRAError: It does: it would see what it is to say.
    """
    half = tokens.shape[1] // 2
    if _depends(model, tokens, slice(half, None), slice(half), tolerance):
        raise _sees_the_future(base)


def check_packing(model: nn.Module, base: Any, tokens: Tensor) -> None:
    """See that what one example says does not depend on the one before it in its row. As `check_no_future`.

    Raises:
        AFLoRAError: It does, or with this attention it may.
    """
    attention = str(base.config._attn_implementation)
    if attention.startswith(("flash", "paged")):  # they tell examples apart in batches of one row only
        raise AFLoRAError(
            f"data.packing does not work with model.attn_implementation={attention} here. Use sdpa, eager or "
            f"flex_attention, or leave packing out."
        )
    half = tokens.shape[1] // 2
    places = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0) % half
    if _depends(model, tokens, slice(half), slice(half, None), 1e-3, position_ids=places):
        raise AFLoRAError(
            f"data.packing does not work with {type(unadapted(base)).__name__} and its attention {attention}: examples "
            f"attend to those before them in the same row. Leave packing out."
        )


@torch.no_grad()
def _depends(
    model: nn.Module, tokens: Tensor, changed: slice, watched: slice, tolerance: float, **inputs: Tensor
) -> bool:
    """Whether what the model says at some places depends on tokens at others, which are turned round."""
    other = tokens.clone()
    other[:, changed] = tokens[:, changed].flip(1)
    one, another = [
        model(input_ids=row, use_cache=False, **inputs).logits[:, watched].float() for row in (tokens, other)
    ]
    return not torch.allclose(one, another, rtol=0, atol=tolerance * float(one.abs().max()))


def _sees_the_future(model: Any) -> AFLoRAError:
    return AFLoRAError(
        f"{type(model).__name__} sees the tokens that come after those that it is to continue, and would learn to copy "
        f"them: it is no causal language model (BERT and its kind are one with is_decoder=true in their config.json)."
    )
