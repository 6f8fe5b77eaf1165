"""Eq. 1 of the paper, y = W0 x + s_b * (B (s_d * (A x))), around one Linear or Conv1D layer.

The two autograd functions below compute it with adapter-sized work only. They stand before and
behind the base layer instead of replacing it, so they never read its weight: a base layer that is
quantized, or whose weight ZeRO-3 gathers only inside its own forward, works unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class _Down(torch.autograd.Function):
    """(x, A) -> (x, h) with h = A x: the input passes through on its way to the base layer.

    Because the base layer reads the x returned here, its gradient arrives in `backward` and the
    adapter's share is added to it by one addmm; autograd would write both and add them.
    x: (..., in), A: (r, in), h: (..., r). x is kept for backward only while A trains.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, accumulate_in_place: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.accumulate_in_place = accumulate_in_place
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A)
        return x.view_as(x), F.linear(x, A.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, A = ctx.saved_tensors
        if grad_h is None:
            return grad_x, None, None
        rows = grad_h.reshape(-1, grad_h.shape[-1])
        grad_A = None
        if ctx.needs_input_grad[1]:
            grad_A = (rows.T @ x.reshape(-1, x.shape[-1])).to(A.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_A, None
        weight = A.to(rows.dtype)
        if grad_x is None:
            return (rows @ weight).view(*grad_h.shape[:-1], -1), grad_A, None
        if ctx.accumulate_in_place and grad_x.is_contiguous() and grad_x.dtype == rows.dtype:
            flat = grad_x.view(-1, grad_x.shape[-1])
            torch.addmm(flat, rows, weight, out=flat)
            return grad_x, grad_A, None
        shape = grad_x.shape
        return (
            torch.addmm(grad_x.reshape(-1, shape[-1]), rows.to(grad_x.dtype), weight.to(grad_x.dtype)).view(shape),
            grad_A,
            None,
        )


class _Up(torch.autograd.Function):
    """(y, h, s_d, B, s_b) -> y + s_b * (B (s_d * h)), with the vectors folded into B.

    y: (..., out), h: (..., r), s_d: (r,), B: (out, r), s_b: (out,). With g the gradient of the
    result, M = g^T h (out, r) holds all that the parameters' gradients need:
    s_b: rowsum(M * B s_d), B: M * s_b s_d, s_d: colsum(M * s_b B).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, s_d: Tensor, B: Tensor, s_b: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(h, s_d, B, s_b)
        folded = (s_b.unsqueeze(1) * B * s_d).to(y.dtype)
        rows = h.reshape(-1, h.shape[-1]).to(y.dtype)
        if in_place:
            ctx.mark_dirty(y)
            flat = y.view(-1, y.shape[-1])
            torch.addmm(flat, rows, folded.T, out=flat)
            return y
        return torch.addmm(y.reshape(-1, y.shape[-1]), rows, folded.T).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, s_d, B, s_b = ctx.saved_tensors
        _, needs_h, needs_d, needs_B, needs_b, _ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_h = grad_d = grad_B = grad_b = None
        if needs_h:
            folded = (s_b.unsqueeze(1) * B * s_d).to(rows.dtype)
            grad_h = (rows @ folded).to(h.dtype).view(h.shape)
        if needs_d or needs_B or needs_b:
            # Written as (h^T g)^T: MKL is much slower over g^T h at thousands of columns (profiling.variants).
            M = (h.reshape(-1, h.shape[-1]).to(rows.dtype).T @ rows).T.to(B.dtype)
            if needs_b or needs_d:
                MB = M * B
                grad_b = MB @ s_d if needs_b else None
                grad_d = s_b @ MB if needs_d else None
            if needs_B:
                grad_B = M * s_b.unsqueeze(1) * s_d
        return grad, grad_h, grad_d, grad_B, grad_b, None


class AFLoRAPath(nn.Module):
    """The low-rank path of one adapter at one layer: A (r, in), B (out, r), s_d (r,), s_b (out,).

    A module of its own, so that engines which gather parameters per module (ZeRO-3) hold all four
    for exactly as long as they are needed.

    Attributes:
        frozen: The projection matrices ("A", "B") that must not train, whatever PEFT switches on.
    """

    def __init__(self, in_features: int, out_features: int, r: int, dropout: float, frozen: set[str]) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, r))
        self.s_d = nn.Parameter(torch.empty(r))
        self.s_b = nn.Parameter(torch.empty(out_features))
        self.dropout = dropout
        self.frozen = set(frozen)

    @torch.no_grad()
    def reset_parameters(self, d_initial: float) -> None:
        """Kaiming uniform (a=0) for A and B, s_d = d_initial, s_b = 0."""
        nn.init.kaiming_uniform_(self.A, a=0)
        nn.init.kaiming_uniform_(self.B, a=0)
        self.s_d.fill_(d_initial)
        self.s_b.zero_()

    def hold_frozen(self) -> None:
        """Switch the gradient of the frozen matrices off."""
        for name in self.frozen:
            self.get_parameter(name).requires_grad_(False)

    def delta_weight(self) -> Tensor:
        """diag(s_b) B diag(s_d) A, shape (out, in), computed in float32 or better."""
        A, B, s_d, s_b = (
            p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in (self.A, self.B, self.s_d, self.s_b)
        )
        return (s_b.unsqueeze(1) * B * s_d) @ A

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor], base_is_plain: bool) -> Tensor:
        """Eq. 1: base(x) plus the low-rank path.

        Args:
            x: (..., in).
            base: Computes W0 x, (..., out).
            base_is_plain: base ends in a Linear or Conv1D, whose output and input gradient are
                fresh tensors that nobody else reads, so they may be added to in place.
        """
        # A compiled graph reuses buffers by itself, and whether y is a view cannot be asked while tracing.
        base_is_plain = base_is_plain and not torch.compiler.is_compiling()
        if self.dropout and self.training:
            h = F.linear(F.dropout(x, self.dropout), self.A.to(x.dtype))
        elif torch.is_grad_enabled() and x.requires_grad:
            x, h = _Down.apply(x, self.A, base_is_plain)
        else:
            h = F.linear(x, self.A.to(x.dtype))
        y = base(x)
        # A view's in-place change would make autograd copy the whole gradient.
        in_place = base_is_plain and y.is_contiguous() and not y._is_view() and not y.is_leaf
        return _Up.apply(y, h, self.s_d, self.B, self.s_b, in_place)

    def extra_repr(self) -> str:
        frozen = "".join(sorted(self.frozen)) or "none"
        return f"in={self.A.shape[-1]}, out={self.B.shape[0]}, r={self.B.shape[-1]}, frozen={frozen}"


class AFLoRALayer(nn.Module, BaseTunerLayer):
    """A Linear or Conv1D layer with one `AFLoRAPath` per adapter, by PEFT's conventions."""

    adapter_layer_names = ("aflora",)
    other_param_names = ("r",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"AFLoRA adapts Linear and Conv1D layers; {type(base_layer).__name__} is neither.")
        self.in_features = in_features
        self.out_features = out_features
        self.aflora = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        d_initial: float,
        dropout: float,
        frozen: set[str],
        init_weights: bool,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter; `frozen` names the matrices that stay at their random start."""
        path = AFLoRAPath(self.in_features, self.out_features, r, dropout, frozen)
        if init_weights:
            path.reset_parameters(d_initial)
        self.aflora[adapter_name] = path
        self.r[adapter_name] = r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def path(self, adapter: str) -> AFLoRAPath:
        """The low-rank path of the named adapter."""
        path = self.aflora[adapter]
        assert isinstance(path, AFLoRAPath)
        return path

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT calls this wherever it has switched gradients on (set_adapter, enable_adapters, ...).
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.aflora:
            if names is None or name in names:
                self.path(name).hold_frozen()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, in the weight's own layout: (out, in), Conv1D (in, out)."""
        delta = self.path(adapter).delta_weight()
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or named) adapters to the base weight.

        Raises:
            ValueError: With safe_merge, if the sum is not finite; the weight is unchanged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.aflora:
                continue
            weight = self.get_base_weight()
            merged = (
                weight.to(torch.promote_types(weight.dtype, torch.float32))
                + self.get_delta_weight(name).to(weight.device)
            ).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"The merged weight is not finite. The adapter {name} seems to be broken.")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what `merge` added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.aflora:
                weight = self.get_base_weight()
                wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
                self.set_base_weight((wide - self.get_delta_weight(name).to(weight.device)).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.aflora]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        device = x.device.type
        if x.is_floating_point() and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # once, for the base layer and every path
        plain = self.quantization_backend is None and type(self.base_layer) in (nn.Linear, Conv1D)

        def call(x: Tensor) -> Tensor:
            return self.base_layer(x, *args, **kwargs)

        for name in active:
            call = partial(self.aflora[name], base=call, base_is_plain=plain)
        if not plain:
            return call(x)
        # On rows a Linear returns a fresh tensor, which can be added to; on more dimensions a view.
        y = call(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def __repr__(self) -> str:
        return "aflora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
