"""The fast way through Eq. 1, as autograd functions. Eq. 1 in plain lines is `equation_1`, at the top of path.py.

They stand before (`Down`) and behind (`Up`) the base layer instead of replacing it, so they never read
its weight: a base layer that is quantized, or whose weight ZeRO-3 gathers only inside its own forward,
works unchanged. The vectors are folded into B (`Fold`), for any number of layers in one go. All of it
is adapter-sized work, and can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StepError
from .casts import cast_once


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass keeps the dtypes of its forward, also where `loss.backward()` stands inside of autocast."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((grad.device.type for grad in grads if grad is not None), "cpu")
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run


def rows_of(tensor: Tensor) -> Tensor:
    """(..., n) as (tokens, n)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


class Down(torch.autograd.Function):
    """(x, A) -> (x, h) with h = A x: the input passes through on its way to the base layer.

    Because the base layer reads the x returned here, its gradient arrives in `backward` and the
    adapter's share is added to it by one addmm; autograd would write both and add them.
    x: (..., in); A: (r, in), in the dtype to compute in; h: (..., r), in A's dtype. x is kept for
    backward only while A trains.

    Args:
        dtype: Of the x to return: autocast's, where it is on.
        plain: The base layer is a Linear that takes rows (tokens, in), so that is what x becomes; and its
            input's gradient is a fresh tensor, which may be added to in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, dtype: torch.dtype, plain: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.plain = x.shape, x.dtype, plain
        passed = x if x.dtype == dtype else cast_once(x, dtype)
        passed = passed.reshape(-1, x.shape[-1]) if plain else passed
        passed = passed.view_as(passed)  # not the input itself, nor what others were given
        ctx.save_for_backward(passed if ctx.needs_input_grad[1] else None, A)
        return passed, F.linear(passed.to(A.dtype), A)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, A = ctx.saved_tensors
        needs_x, needs_A = ctx.needs_input_grad[:2]
        grad_A = None
        if grad_h is not None:
            rows = rows_of(grad_h)
            grad_A = rows.T @ rows_of(x).to(rows.dtype) if needs_A else None
            if needs_x:
                grad_x = Down._plus(grad_x, rows, A, in_place=ctx.plain and not torch.is_grad_enabled())
        if grad_x is None or not needs_x:
            return None, grad_A, None, None
        return grad_x.view(ctx.shape).to(ctx.dtype), grad_A, None, None

    @staticmethod
    def _plus(grad_x: Tensor | None, rows: Tensor, A: Tensor, in_place: bool) -> Tensor:
        """grad_x + rows A, (tokens, in)."""
        if grad_x is None:
            return rows @ A
        flat = rows_of(grad_x)
        if flat.dtype != rows.dtype:  # a half-precision base, and an adapter in float32
            return flat + (rows @ A).to(flat.dtype)
        if in_place and flat.is_contiguous():
            return torch.addmm(flat, rows, A, out=flat)
        return torch.addmm(flat, rows, A)


class Up(torch.autograd.Function):
    """(y, h, F) -> y + h F with F = (s_b B s_d)^T.

    y: (..., out); h: (..., r) and F: (r, out), both in the dtype to compute in. The gradient of F, h^T g
    with g the gradient of the result, holds all that those of the vectors and of B need (`Fold`).

    Args:
        in_place: Nobody else reads y; the result is written there.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, folded: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(h, folded)
        rows, flat = rows_of(h), rows_of(y)
        if in_place:
            ctx.mark_dirty(y)
        if y.dtype != h.dtype:  # a half-precision base, and an adapter in float32: rounded once
            change = (rows @ folded).view(y.shape)
            return y.add_(change) if in_place else (y + change).to(y.dtype)
        if in_place:
            torch.addmm(flat, rows, folded, out=flat)
            return y
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)  # no view: the model may write to it in place
        torch.addmm(flat, rows, folded, out=out.view(flat.shape))
        return out

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, folded = ctx.saved_tensors
        _, needs_h, needs_folded, _ = ctx.needs_input_grad
        g, rows = rows_of(grad).to(h.dtype), rows_of(h)
        grad_h = (g @ folded.T).view(h.shape) if needs_h else None
        return grad, grad_h, rows.T @ g if needs_folded else None, None


@dataclass(frozen=True)
class Layout:
    """How the rows of several B lie side by side: `outs` of them each, equal sizes next to each other."""

    outs: tuple[int, ...]
    device: torch.device

    @cached_property
    def owner(self) -> Tensor | None:
        """To which B each row belongs, (sum of outs,) int64; None where there is only one."""
        if len(self.outs) == 1:
            return None
        with torch.inference_mode(False):  # it is kept, and a training may come later
            owners = torch.arange(len(self.outs)).repeat_interleave(torch.tensor(self.outs))
            return owners.to(self.device)

    def for_each_row(self, of_each_B: Tensor) -> Tensor:
        """(r, n) -> (r, sum of outs), or what broadcasts to it."""
        return of_each_B if self.owner is None else of_each_B.index_select(1, self.owner)

    def sum_of_each(self, of_each_row: Tensor) -> list[Tensor]:
        """(r, sum of outs) -> n sums over the rows of one B, (r,)"""
        sums: list[Tensor] = []
        start = 0
        for out, same in groupby(self.outs):
            count = len(list(same))
            block = of_each_row[:, start : start + count * out].unflatten(1, (count, out))
            sums += block.sum(2).T.contiguous().unbind()
            start += count * out
        return sums


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class Fold(torch.autograd.Function):
    """(s_b, s_d, B) of n layers -> F = (s_b B s_d)^T of each, (r, out), in `dtype`; computed in float32 or better.

    All layers at once, so that a step takes a dozen kernels for them however many they are. Transposed, since BLAS
    reads long rows twice as fast (profiling.variants).
    With M the gradient of F: s_b: colsum(M * s_d B^T), B^T: M * s_d s_b, s_d: rowsum(M * B^T s_b).

    The parameters are not saved as autograd saves, but held: reentrant checkpointing comes here once
    for each of its segments, and finds saved tensors freed. That nobody changed them is checked here.

    Args:
        known: F, where it is known already (`fold`): then only the way back is new.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, layout: Layout, known: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.parameters = layout, parameters
        # ZeRO-3 fills a parameter anew for each pass; inference tensors have no versions.
        ctx.versions = [p._version for p in parameters] if any(ctx.needs_input_grad) else []
        if known is not None:
            return (known.detach(),)
        S, D, B = Fold._stacked(layout, parameters)
        return (D * S).mul_(B).to(dtype).split(list(layout.outs), 1)

    @staticmethod
    def _stacked(layout: Layout, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """S (1, rows), D (r, rows) and B^T (r, rows), in float32 or better."""
        n = len(layout.outs)
        s_b, s_d, B = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
        wide = torch.float64 if B[0].dtype == torch.float64 else torch.float32
        D = s_d[0].unsqueeze(1) if n == 1 else torch.stack(list(s_d), 1)
        return _cat(s_b).to(wide).unsqueeze(0), layout.for_each_row(D.to(wide)), _cat(B).to(wide).T

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, parameters = ctx.layout, ctx.parameters
        if [p._version for p in parameters] != ctx.versions:
            raise StepError(
                "A parameter of an AFLoRA adapter (s_b, s_d or B) has been modified by an inplace operation between "
                "forward and backward, so its gradient cannot be computed. Update parameters after backward."
            )
        n = len(layout.outs)
        present = [grad is not None for grad in grads]
        needs_b, needs_d, needs_B = (ctx.needs_input_grad[3 + k * n : 3 + (k + 1) * n] for k in range(3))
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None, *([None] * len(parameters))
        if n == 1:
            return None, None, None, *Fold._of_one(parameters, some, ctx.needs_input_grad[3:])
        S, D, B = Fold._stacked(layout, parameters)
        r = some.shape[0]
        pieces = [some.new_zeros(r, out) if M is None else M for M, out in zip(grads, layout.outs, strict=True)]
        M = _cat(pieces, 1).to(B.dtype)
        nothing: list[Tensor | None] = [None] * n
        grad_b, grad_d, grad_B = nothing, nothing, nothing
        MB = M * B
        if any(needs_b):
            grad_b = list((MB * D).sum(0).split(list(layout.outs)))
        if any(needs_d):
            grad_d = list(layout.sum_of_each(MB * S))
        if any(needs_B):
            grad_B = list((M * S * D).T.contiguous().split(list(layout.outs)))
        found = [*grad_b, *grad_d, *grad_B]
        needs = [*needs_b, *needs_d, *needs_B]
        for i, (parameter, need, seen) in enumerate(zip(parameters, needs, present * 3, strict=True)):
            grad = found[i]
            found[i] = grad.to(parameter.dtype) if grad is not None and need and seen else None
        return None, None, None, *found

    @staticmethod
    def _of_one(parameters: Sequence[Tensor], M: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """The same for one layer, in fewer kernels."""
        wide = torch.float64 if parameters[2].dtype == torch.float64 else torch.float32
        s_b, s_d, B = (parameter.to(wide) for parameter in parameters)
        M = M.to(wide)
        MB = M * B.T if needs[0] or needs[1] else M
        grads = (
            (MB * s_d.unsqueeze(1)).sum(0) if needs[0] else None,  # no products of matrices, which TF32 rounds
            (MB * s_b).sum(1) if needs[1] else None,
            (M * s_b).T * s_d if needs[2] else None,
        )
        return [None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]


class Cast(torch.autograd.Function):
    """n matrices A (r, in) -> the same in `dtype`, in one kernel; without a change of dtype, aliases of them.

    What comes out requires gradients if any of them does: also those of matrices that are frozen, whose
    gradients end here.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [A.dtype for A in matrices]
        if all(A.dtype == dtype for A in matrices):
            return tuple(A.view_as(A) for A in matrices)
        flat = _cat([A.reshape(-1) for A in matrices]).to(dtype)
        pieces = flat.split([A.numel() for A in matrices])
        return tuple(piece.view(A.shape) for piece, A in zip(pieces, matrices, strict=True))

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        wanted = [i for i, grad in enumerate(grads) if grad is not None and needs[i]]
        found: list[Tensor | None] = [None] * len(grads)
        if wanted and all(grads[i].dtype == ctx.dtypes[i] for i in wanted):  # type: ignore[union-attr]
            for i in wanted:
                found[i] = grads[i]
        elif wanted:
            chosen = [grad for i in wanted if (grad := grads[i]) is not None]
            flat = _cat([grad.reshape(-1) for grad in chosen]).to(ctx.dtypes[wanted[0]])
            for i, grad, piece in zip(wanted, chosen, flat.split([grad.numel() for grad in chosen]), strict=True):
                found[i] = piece.view(grad.shape)
        return None, *found
