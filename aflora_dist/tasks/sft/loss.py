"""The cross entropy of a language model's tokens, without all their logits at once.

The model's own head is asked, inside its own forward, for the logits of a few tokens at a time, and the gradients of
that part are taken at once. So nothing of the size of the vocabulary lives longer than a chunk; what an engine does
around a module's forward (ZeRO-3 and FSDP2 gather its weight) holds; and whatever the head is made of (tied to the
embedding, trained whole, adapted, quantised) is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ...errors import AFLoRAError
from ..model import unadapted

# Logits of a chunk: what a GPU needs to be busy, and a CPU's caches like.
_LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**26}


class ChunkedCrossEntropy:
    """The sum of a language model's cross entropy over chosen tokens.

    Args:
        model: Unwrapped; a causal language model, PEFT's or not. Its head is another one from now on while, and only
            while, this is called.
        logits_per_chunk: How many logits may live at once; by the device if not given.
        smoothing: Share of a token's probability that is spread over the vocabulary, where gradients are taken.

    Raises:
        AFLoRAError: The model has no head.
    """

    def __init__(self, model: Any, logits_per_chunk: int | None = None, smoothing: float = 0.0) -> None:
        self.head = _head_of(model)
        self.logits_per_chunk, self.smoothing = logits_per_chunk, smoothing
        self._logits: Callable[[Tensor], Tensor] = self.head.forward
        self._wanted: tuple[Tensor, Tensor] | None = None
        self._seen: Tensor | None = None
        self._watching = False
        self.head.forward = self._forward
        self.whole = False  # whether the model does more with its logits than its head says

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross entropy of `targets` (tokens,), a float32 scalar.

        Args:
            model: As it was prepared.
            inputs: What it is called with.
            positions: Where in the flattened batch the model says what comes next, (tokens,).
        """
        if self.whole:
            logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[positions]
            smoothing = self.smoothing if torch.is_grad_enabled() else 0.0
            return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
        self._wanted = (positions, targets)
        try:
            return model(**inputs, use_cache=False).logits.float().sum()  # of one element
        finally:
            self._wanted = None

    @torch.no_grad()
    def rehearse(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """See whether the model's logits are what its head says: some cap or scale them, and need them whole."""
        self._watching = True
        try:
            logits = model(**inputs, use_cache=False).logits
        finally:
            self._watching = False
        seen, self._seen = self._seen, None
        self.whole = seen is None or seen.shape != logits.shape or not torch.equal(seen.float(), logits.float())

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._watching:
            self._seen = self._logits(hidden)
            return self._seen
        if self._wanted is None:
            return self._logits(hidden)
        positions, targets = self._wanted
        hidden = hidden.flatten(0, -2)[positions]
        parameters = [p for p in self.head.parameters() if p.requires_grad]
        kind = "cuda" if hidden.device.type == "cuda" else "cpu"
        vocabulary = int(getattr(self.head, "out_features", 0)) or 2**17
        chunk = max((self.logits_per_chunk or _LOGITS_PER_CHUNK[kind]) // vocabulary, 1)
        differentiate = torch.is_grad_enabled()
        smoothing = self.smoothing if differentiate else 0.0
        loss: Tensor = _SumOfChunks.apply(self._logits, hidden, targets, chunk, differentiate, smoothing, *parameters)
        return loss.reshape(1, 1, 1)


class _SumOfChunks(torch.autograd.Function):
    """Cross entropy whose gradients are taken in the forward, chunk by chunk; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        hidden: Tensor,
        targets: Tensor,
        chunk: int,
        differentiate: bool,
        smoothing: float,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden = differentiate and hidden.requires_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grads = [torch.zeros_like(p) for p in parameters] if differentiate else []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wants_hidden or bool(grads)):
                rows = hidden[part].detach().requires_grad_(wants_hidden)
                logits = logits_of(rows).float()
                loss = F.cross_entropy(logits, targets[part], reduction="sum", label_smoothing=smoothing)
            total += loss.detach()
            wanted: Sequence[Tensor] = [rows, *parameters] if wants_hidden else list(parameters)
            if not differentiate or not wanted:
                continue
            found = list(torch.autograd.grad(loss, wanted))
            if grad_hidden is not None:
                grad_hidden[part] = found.pop(0)
            for grad, more in zip(grads, found, strict=True):
                grad += more
        ctx.gradients = (grad_hidden, grads)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        (grad_hidden, grads), ctx.gradients = ctx.gradients, None
        scaled = None if grad_hidden is None else grad_hidden.mul_(outer.to(grad_hidden.dtype))
        return (None, scaled, None, None, None, None, *(grad.mul_(outer.to(grad.dtype)) for grad in grads))


def _head_of(model: Any) -> nn.Module:
    inner = unadapted(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise AFLoRAError(f"{type(inner).__name__} has no language-model head.")
    if isinstance(head, ModulesToSaveWrapper):  # whose copy holds what is trained, and what ZeRO-3 gathers
        head = head.modules_to_save[head.active_adapters[0]]
    return head
