"""Two Triton kernels for the upper half of Eq. 1, s_b * (B (s_d * h)) with the vectors folded into B.

The package does without them: what they gain is for a GPU to say (`make gpu`). `used` has AFLoRA's layers go through
them. Importing this module does not import triton. In all of it T is the number of rows (tokens) and r the rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aflora_dist.adapter import path
from aflora_dist.adapter.eq1 import Up, outside_autocast, rows_of
from aflora_dist.compat.patch import patch

if TYPE_CHECKING:
    import triton.language as tl  # when running: from the first launch on (see _jitted)

MAX_RANK = 64  # a whole row of h stays in registers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ROWS = 64  # of a tile of g or y


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def available() -> bool:
    """Whether the kernels can run here: triton and a CUDA or ROCm device, or its interpreter (TRITON_INTERPRET=1)."""
    return _installed() and (_interpreted() or torch.cuda.is_available())


def fit(rows: Tensor, r: int) -> bool:
    """Whether the kernels take such rows, (T, out), at rank r.

    Not for ranks above 64, float64, tensors on a CPU (unless interpreted) and inside torch.compile, which makes
    kernels of its own.
    """
    known = r <= MAX_RANK and rows.dtype in _DTYPES and (rows.is_cuda or _interpreted())
    return known and not torch.compiler.is_compiling()


class TritonUp(Up):
    """`Up` through the kernels, where they take what they are given."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, folded: Tensor, in_place: bool) -> Tensor:
        if not in_place or y.dtype != h.dtype or not fit(rows_of(y), h.shape[-1]):
            return Up.forward(ctx, y, h, folded, in_place)
        ctx.save_for_backward(h, folded)
        ctx.mark_dirty(y)
        up_forward_(rows_of(y), rows_of(h), folded.T)
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, folded = ctx.saved_tensors
        _, needs_h, needs_folded, _ = ctx.needs_input_grad
        g, rows = rows_of(grad).to(h.dtype), rows_of(h)
        if not (needs_h and needs_folded) or torch.is_grad_enabled() or not fit(g, rows.shape[1]):
            return Up.backward(ctx, grad)
        grad_rows, M = up_backward(g, rows, folded.T)
        return grad, grad_rows.view(h.shape), M.T, None


@contextmanager
def used() -> Iterator[None]:
    """While entered, AFLoRA's layers go through the kernels.

    Raises:
        SystemExit: They cannot run on this machine.
    """
    if not available():
        raise SystemExit("The Triton kernels need a GPU and triton (pip install triton).")
    take_back = patch(path, "Up", TritonUp)
    try:
        yield
    finally:
        take_back()


def up_backward(g: Tensor, h: Tensor, folded: Tensor) -> tuple[Tensor, Tensor]:
    """grad_h = g folded and M = g^T h, reading g once.

    A program owns 64 rows and walks over all columns: its rows of grad_h add up in registers, and what it adds to M
    is a partial sum of its own, for M is thin (r columns). The other way round, a program owning columns, M would be
    whole and grad_h in parts, but few programs would each walk over thousands of rows. The partial sums are added by
    one small reduction in a fixed order, without atomics: the same input gives the same bits.

    Args:
        g: Gradient of the result, (T, out); float32, float16 or bfloat16.
        h: (T, r), r at most 64; any of these dtypes.
        folded: s_b B s_d, (out, r); any of these dtypes.

    Returns:
        grad_h (T, r) in h's dtype, and M (out, r) in float32. Products are made in the widest of the three dtypes
        and added in float32; float32 products are TF32 where torch's own are.

    Raises:
        ValueError: Shapes do not fit, or r is above 64.
        TypeError: A dtype that the kernels do not take.
    """
    compute = _check(g, h, folded)
    rows, columns, r = *g.shape, h.shape[1]
    if g.stride(1) != 1:
        g = g.contiguous()
    h, folded = h.contiguous(), folded.contiguous()
    grad_h = torch.empty_like(h)
    if not rows:
        return grad_h, g.new_zeros(columns, r, dtype=torch.float32)
    programs = -(-rows // _ROWS)
    parts = torch.empty(programs, columns, r, dtype=torch.float32, device=g.device)
    _jitted()[0][(programs,)](
        g,
        h,
        folded,
        grad_h,
        parts,
        rows,
        columns,
        g.stride(0),
        r,
        _padded(r),
        _ROWS,
        _columns(compute),
        compute,
        _precision(),
    )
    return grad_h, parts[0] if programs == 1 else parts.sum(0)


def up_forward_(y: Tensor, h: Tensor, folded: Tensor) -> Tensor:
    """y += h folded^T, in place.

    Args:
        y: (T, out), its rows contiguous; float32, float16 or bfloat16.
        h: (T, r), r at most 64; any of these dtypes.
        folded: s_b B s_d, (out, r); any of these dtypes.

    Returns:
        y. The sum is made in float32 and rounded once.

    Raises:
        ValueError: Shapes do not fit, y's rows are not contiguous, or r is above 64.
        TypeError: A dtype that the kernels do not take.
    """
    compute = _check(y, h, folded)
    rows, columns, r = *y.shape, h.shape[1]
    if y.stride(1) != 1:
        raise ValueError("y is added to in place, so its rows must be contiguous.")
    if rows:
        h, folded = h.contiguous(), folded.contiguous()
        grid = (-(-rows // _ROWS), -(-columns // _columns(compute)))
        _jitted()[1][grid](
            y, h, folded, rows, columns, y.stride(0), r, _padded(r), _ROWS, _columns(compute), compute, _precision()
        )
    return y


def _check(wide: Tensor, h: Tensor, folded: Tensor) -> Any:
    """The dtype, as triton names it, in which products are made."""
    if wide.dim() != 2 or h.shape != (len(wide), h.shape[-1]) or folded.shape != (wide.shape[1], h.shape[-1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (wide, h, folded))
        raise ValueError(f"(T, out), (T, r) and (out, r) are expected, not {shapes}.")
    if not 0 < h.shape[1] <= MAX_RANK:
        raise ValueError(f"The kernels are for ranks from 1 to {MAX_RANK}, not {h.shape[1]}.")
    dtypes = [t.dtype for t in (wide, h, folded)]
    if not set(dtypes) <= set(_DTYPES):
        raise TypeError(f"The kernels take float32, float16 and bfloat16, not {dtypes}.")
    _jitted()
    # Half-precision products are exact in float32, so that the sums are, too.
    compute = reduce(torch.promote_types, dtypes)
    if _interpreted():
        compute = torch.float32  # numpy has no bfloat16; and rounding of products is the hardware's
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[compute]


def _padded(r: int) -> int:
    """Tensor cores multiply by at least 16 columns."""
    return max(16, 1 << (r - 1).bit_length())


def _columns(compute: Any) -> int:
    """Columns of a tile: 16 kB each, so that several programs fit beside each other into shared memory."""
    return 64 if compute == tl.float32 else 128


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@cache
def _jitted() -> tuple[Any, Any]:
    import triton
    import triton.language

    globals()["tl"] = triton.language  # where triton looks the names up that kernels use
    return triton.jit(_up_backward), triton.jit(_up_forward)


def _up_backward(  # type: ignore[no-untyped-def]
    g,
    h,
    folded,
    grad_h,
    parts,
    rows,
    columns,
    stride,
    r,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # g may hold more elements than 32 bits count
    t = program * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, R)[None, :]
    inside_h = (t < rows) & (k < r)
    h_tile = tl.load(h + t * r + k, mask=inside_h, other=0.0).to(COMPUTE)
    sums = tl.zeros((ROWS, R), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside_g = (t < rows) & (column[None, :] < columns)
        g_tile = tl.load(g + t * stride + column[None, :], mask=inside_g, other=0.0).to(COMPUTE)
        place = column[:, None] * r + k
        inside = (column[:, None] < columns) & (k < r)
        folded_tile = tl.load(folded + place, mask=inside, other=0.0).to(COMPUTE)
        sums = tl.dot(g_tile, folded_tile, acc=sums, input_precision=PRECISION)
        part = tl.dot(tl.trans(g_tile), h_tile, input_precision=PRECISION)
        tl.store(parts + program * columns * r + place, part, mask=inside)
    tl.store(grad_h + t * r + k, sums.to(grad_h.dtype.element_ty), mask=inside_h)


def _up_forward(  # type: ignore[no-untyped-def]
    y,
    h,
    folded,
    rows,
    columns,
    stride,
    r,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, R)
    h_tile = tl.load(h + t * r + k[None, :], mask=(t < rows) & (k[None, :] < r), other=0.0).to(COMPUTE)
    inside = (column[None, :] < columns) & (k[:, None] < r)
    folded_tile = tl.load(folded + column[None, :] * r + k[:, None], mask=inside, other=0.0).to(COMPUTE)
    place = y + t * stride + column[None, :]
    inside_y = (t < rows) & (column[None, :] < columns)
    y_tile = tl.load(place, mask=inside_y, other=0.0).to(tl.float32)
    y_tile = tl.dot(h_tile, folded_tile, acc=y_tile, input_precision=PRECISION)
    tl.store(place, y_tile.to(y.dtype.element_ty), mask=inside_y)
