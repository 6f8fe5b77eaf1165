"""Gradients before clipping, in loops where the user clips: how clipping is undone, and noticed where it cannot be.

For one process, DDP and FSDP2. DeepSpeed clips by itself, see deepspeed/.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compat.patch import patch_method
from ..compat.torch import after_backward, weakly
from ..errors import UnsupportedEngineError

_CLIP_ONCE = (
    "Freezing scores are taken before clipping, which can only be undone where all gradients are clipped together: "
    "call accelerator.clip_grad_norm_(model.parameters(), ...) once per update, if accelerator.sync_gradients."
)


class Clipping:
    """Knows by what the gradients of this update were multiplied since the backward pass.

    Two watches, since a loop may leave accelerate's methods out. accelerator.clip_grad_norm_ is seen and its
    factor remembered. Whatever else changes a gradient between the end of the backward pass and the update is seen by
    the tensor's version, and refused, torch's own clip_grad_norm_ above all.

    Args:
        observed: The parameters whose gradients are scored now; none: everything is allowed.
    """

    def __init__(self, accelerator: Accelerator, observed: Callable[[], Sequence[nn.Parameter]]) -> None:
        self.accelerator = accelerator
        self.observed = observed
        self._clipped: tuple[set[int], Tensor] | None = None  # parameters, factor
        self._versions: dict[int, int] = {}  # of each gradient as the backward pass or a known change left it
        self._clipped_gradients: list[weakref.ref[Tensor]] = []
        self._hooks: list[Any] = []
        self._queued = False
        self._handles: list[Callable[[], None]] = []

    def watch(self) -> None:
        """Begin to look."""
        for name, replacement in (
            ("clip_grad_norm_", self._clip_grad_norm),
            ("clip_grad_value_", self._clip_grad_value),
            ("backward", self._backward),
        ):
            self._handles.append(patch_method(self.accelerator, name, replacement))
        if self.accelerator.scaler is not None:
            self._handles.append(patch_method(self.accelerator.scaler, "unscale_", self._unscale))
        self.follow()

    def unwatch(self) -> None:
        while self._handles:
            self._handles.pop()()
        self._unhook()

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def follow(self) -> None:
        """What is observed has changed: watch the backward passes of what still is."""
        self._unhook()
        hook = weakly(self._accumulated)  # else model, hook and engine would keep each other alive for ever
        for parameter in self.observed():
            trains = parameter.requires_grad
            parameter.requires_grad_(True)  # torch asks for it; the user may have switched it off for a while
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
            parameter.requires_grad_(trains)

    def factor(self, parameters: Sequence[nn.Parameter]) -> Tensor | float:
        """What to multiply the gradients of these parameters with to have them before clipping.

        Raises an UnsupportedEngineError if they were clipped in a way that cannot be undone, or changed unseen.
        """
        self._refuse_unseen_change()
        if self._clipped is None or not parameters:
            return 1.0
        clipped, coefficient = self._clipped
        inside = [id(p) in clipped for p in parameters]
        if any(inside) and not all(inside):
            raise UnsupportedEngineError(_CLIP_ONCE)
        return 1.0 / coefficient.to(torch.float32) if all(inside) else 1.0

    def updated(self) -> None:
        """The gradients have been used, or thrown away."""
        self._clipped, self._clipped_gradients, self._versions = None, [], {}
        self._queued = False

    # -- what is patched ----------------------------------------------------------------------

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._refuse_unseen_change(zeroed=True)  # afterwards nothing would tell it
        result = original(*args, **kwargs)
        self._backward_ended()
        return result

    def _accumulated(self) -> None:
        # Of a plain loss.backward(), too. The engine's own callbacks (DDP writes the reduced gradients in one) are
        # queued by the time ours runs, so one more round comes after all of them.
        if not self._queued:
            self._queued = True
            after_backward(lambda: after_backward(self._backward_ended))

    def _backward_ended(self) -> None:
        self._queued = False
        if self._clipped is not None:
            clipped = {id(g) for ref in self._clipped_gradients if (g := ref()) is not None}
            unchanged = [self._versions.get(id(g)) == g._version and id(g) in clipped for g in self._gradients()]
            if unchanged and all(unchanged):  # a backward pass of another model
                return
            if any(id(gradient) in clipped for gradient in self._gradients()):
                raise UnsupportedEngineError(_CLIP_ONCE)  # something was added to gradients that were clipped already
            self.updated()  # they were thrown away: a batch was skipped
        self._note()

    def _unscale(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._refuse_unseen_change()
        result = original(*args, **kwargs)
        self._note()
        return result

    def _clip_grad_norm(
        self, original: Callable[..., Tensor], parameters: Any, max_norm: float, norm_type: float = 2
    ) -> Tensor:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        clipped = {id(p) for p in parameters}
        observing = any(id(p) in clipped for p in self.observed())  # else another model is clipped, or the head alone
        if observing and not self.accelerator.sync_gradients:
            raise UnsupportedEngineError(_CLIP_ONCE)
        if observing and not max_norm > 0:
            raise UnsupportedEngineError(
                f"accelerator.clip_grad_norm_ was given max_norm={max_norm:g}, which leaves nothing of the gradients. "
                f"Where they are not to be clipped, leave the call out."
            )
        self._refuse_unseen_change()
        norm = self._clip(original, parameters, max_norm, norm_type)
        if observing:
            whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
            # What torch.nn.utils.clip_grad_norm_ multiplied the gradients with.
            coefficient = (max_norm / (whole + 1e-6)).clamp(max=1.0)
            if self._clipped is not None:  # clipped once before in this update
                if self._clipped[0] != clipped:
                    raise UnsupportedEngineError(_CLIP_ONCE)
                coefficient = coefficient * self._clipped[1]
            self._clipped = (clipped, coefficient)
            self._clipped_gradients = [weakref.ref(gradient) for gradient in self._gradients()]
            self._note()
        return norm

    def _clip(
        self, original: Callable[..., Tensor], parameters: list[Any], max_norm: float, norm_type: float
    ) -> Tensor:
        """Clip, by their joint norm also where FSDP2 shards some gradients and not all, which torch does not take."""
        kinds = [
            [p for p in parameters if p.grad is not None and isinstance(p.grad, DTensor) is sharded]
            for sharded in (False, True)
        ]
        if not all(kinds):
            return original(parameters, max_norm, norm_type)
        self.accelerator.unscale_gradients()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in those], norm_type) for those in kinds]
        whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = torch.linalg.vector_norm(torch.stack(whole), norm_type)
        for those in kinds:
            torch.nn.utils.clip_grads_with_norm_(those, max_norm, total)
        return total

    def _clip_grad_value(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.observed():
            return original(*args, **kwargs)
        raise UnsupportedEngineError(
            "Freezing scores are taken from gradients before clipping, and clipping by value cannot be undone. "
            "Use accelerator.clip_grad_norm_ instead."
        )

    # -- versions ----------------------------------------------------------------------------

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.observed() if p.grad is not None]

    def _note(self) -> None:
        self._versions = {id(gradient): gradient._version for gradient in self._gradients()}

    def _refuse_unseen_change(self, zeroed: bool = False) -> None:
        """`zeroed`: they may have been set to zero, for a batch that is left out."""
        if not self._versions:
            return
        for gradient in self._gradients():
            changed = self._versions.get(id(gradient)) != gradient._version
            if changed and not (zeroed and not gradient.any()):
                raise UnsupportedEngineError(
                    "The gradients changed between the backward pass and optimizer.step(). Freezing scores need them "
                    "before clipping: use accelerator.clip_grad_norm_ instead of torch.nn.utils.clip_grad_norm_, and "
                    "accelerate's mixed_precision instead of a GradScaler of your own."
                )
