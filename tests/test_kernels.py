"""The Triton kernels against float64 products, and compiled. Without a GPU this takes two runs, as in .ci/run:

TRITON_INTERPRET=1 pytest tests/test_kernels.py; pytest tests/test_kernels.py -k compile
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from aflora_dist.adapter import path
from profiling import kernels


def interpreted(test: Any) -> Any:
    """One of the tests for GPUs, which the interpreter can run as well."""
    reason = "needs triton, and TRITON_INTERPRET=1 or a CUDA device"
    return pytest.mark.gpu(pytest.mark.skipif(not kernels.available(), reason=reason)(test))


DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
HALVES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Each shape in one dtype, one shape in each.
SHAPES = [(150, 200, 4, dtype) for dtype in HALVES]
SHAPES += [(1, 48, 1, "bfloat16"), (7, 48, 3, "float32"), (64, 128, 4, "float16")]
SHAPES += [(130, 48, 32, "bfloat16"), (70, 33, 64, "float32")]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the result, once


def tensors(rows: int, columns: int, r: int, *dtypes: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns + r)
    shapes = ((rows, columns), (rows, r), (columns, r))
    made = [
        torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return made[0], made[1], made[2]


def assert_close(found: Tensor, left: Tensor, right: Tensor, start: Tensor | float = 0.0) -> None:
    """`found` is start + left right up to float32 sums and one rounding to its dtype."""
    expected = left.double() @ right.double() + start
    room = 1e-6 * (left.double().abs() @ right.double().abs()) + ROUNDING[found.dtype] * expected.abs() + 1e-7
    assert ((found.double() - expected).abs() <= room).all()


@interpreted
@pytest.mark.parametrize(("rows", "columns", "r", "dtype"), SHAPES)
def test_both_products_in_one_pass_are_those_of_float64(rows: int, columns: int, r: int, dtype: str) -> None:
    g, h, folded = tensors(rows, columns, r, *[HALVES[dtype]] * 3)
    grad_h, M = kernels.up_backward(g, h, folded)
    assert (grad_h.dtype, M.dtype) == (h.dtype, torch.float32)
    assert_close(grad_h, g, folded)
    assert_close(M, g.T, h)


@interpreted
@pytest.mark.parametrize(("rows", "columns", "r", "dtype"), SHAPES)
def test_the_low_rank_path_is_added_in_place(rows: int, columns: int, r: int, dtype: str) -> None:
    y, h, folded = tensors(rows, columns, r, *[HALVES[dtype]] * 3)
    before = y.double()
    assert kernels.up_forward_(y, h, folded) is y
    assert_close(y, h, folded.T, before)


@interpreted
def test_dtypes_may_differ_and_rows_may_lie_apart() -> None:
    """A half-precision base whose adapter computes in float32; g as a slice, or transposed."""
    wide, h, folded = tensors(70, 200, 4, torch.float16, torch.float32, torch.float32)
    g = wide[:, 40:110]
    assert not g.is_contiguous()
    for rows in (g, g.T.contiguous().T):
        grad_h, M = kernels.up_backward(rows, h, folded[40:110])
        assert_close(grad_h, g, folded[40:110])
        assert_close(M, g.T, h)
    before = wide.double()
    kernels.up_forward_(g, h, folded[40:110])
    assert_close(g, h, folded[40:110].T, before[:, 40:110])
    assert torch.equal(wide[:, :40].double(), before[:, :40])
    assert torch.equal(wide[:, 110:].double(), before[:, 110:])


@interpreted
def test_the_same_input_gives_the_same_bits_and_no_rows_give_nothing() -> None:
    g, h, folded = tensors(150, 200, 4, *[torch.float32] * 3)
    for first, second in zip(kernels.up_backward(g, h, folded), kernels.up_backward(g, h, folded), strict=True):
        assert torch.equal(first, second)
    grad_h, M = kernels.up_backward(g[:0], h[:0], folded)
    assert grad_h.shape == (0, 4)
    assert torch.equal(M, torch.zeros_like(folded))
    assert kernels.up_forward_(g[:0], h[:0], folded).shape == (0, 200)


@interpreted
def test_what_the_kernels_do_not_take_is_refused() -> None:
    g, h, folded = tensors(8, 48, 4, *[torch.float32] * 3)
    with pytest.raises(ValueError, match=r"are expected, not \(8, 48\), \(8, 4\), \(47, 4\)"):
        kernels.up_backward(g, h, folded[:47])
    with pytest.raises(ValueError, match="ranks from 1 to 64, not 65"):
        kernels.up_backward(*tensors(8, 48, 65, *[torch.float32] * 3))
    with pytest.raises(TypeError, match=r"not \[torch.float64"):
        kernels.up_backward(g.double(), h, folded)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.up_forward_(torch.zeros(48, 8, device=DEVICE).T, h, folded)


@interpreted
def test_they_are_used_only_where_they_fit() -> None:
    rows = torch.zeros(2, 3, device=DEVICE)
    assert kernels.fit(rows, 4)
    assert not kernels.fit(rows, 65)
    assert not kernels.fit(rows.double(), 4)


def test_layers_go_through_them_only_when_asked_and_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = path.Up
    monkeypatch.setattr(kernels, "available", lambda: True)
    with kernels.used():
        assert path.Up is kernels.TritonUp
    assert path.Up is plain
    monkeypatch.setattr(kernels, "available", lambda: False)
    with pytest.raises(SystemExit, match="need a GPU and triton"), kernels.used():
        pass


@pytest.mark.skipif(
    not kernels._installed() or kernels._interpreted(), reason="needs triton without TRITON_INTERPRET, which alters it"
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "ieee"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")]
)
def test_they_compile_for_gpus_that_are_not_here(dtype: str, precision: str, capability: int) -> None:
    """To machine code, within the shared memory that every GPU since Ampere has; half precision on tensor cores."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels._jitted()  # names triton's language
    compute = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16, "fp16": triton.language.float16}[
        dtype
    ]
    for function in (kernels._up_backward, kernels._up_forward):
        jitted = triton.JITFunction(function)
        constants = {"R": 64, "ROWS": kernels._ROWS, "COLUMNS": kernels._columns(compute), "COMPUTE": compute}
        constants["PRECISION"] = precision
        signature = {
            name: "constexpr"
            if name in constants
            else "i32"
            if name in ("rows", "columns", "stride", "r")
            else "*" + ("fp32" if name == "parts" else dtype)
            for name in jitted.arg_names
        }
        values = {(jitted.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=jitted, signature=signature, constexprs=values)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.metadata.shared <= 99 * 1024
        assert ("mma" in compiled.asm["ptx"]) == (dtype != "fp32" or precision == "tf32")
