"""One Linear or Conv1D layer with its low-rank paths (Eq. 1 of the paper), by PEFT's conventions."""

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
from transformers.pytorch_utils import Conv1D

from .eq1 import Down, Up, cast_once
from .folding import Folded, KeptCast, compute_dtype, fold, is_traced, lies_whole, promoted
from .guard import FreezingGuard
from .private import has_hooks, in_backward, keeps_all_for_backward


class AFLoRAPath(nn.Module):
    """The low-rank path of one adapter at one layer: A (r, in), B (out, r), s_d (r,), s_b (out,).

    A module of its own, so that engines which gather parameters per module (ZeRO-3) hold all four
    for exactly as long as they are needed.

    Attributes:
        frozen: The projection matrices ("A", "B") that must not train, whatever PEFT switches on.
        adaptive: The others are to freeze by score while they train.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, dropout: float, frozen: set[str], adaptive: bool = False
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, r))
        self.s_d = nn.Parameter(torch.empty(r))
        self.s_b = nn.Parameter(torch.empty(out_features))
        self.dropout = dropout
        self.frozen = set(frozen)
        self.adaptive = adaptive
        self._folded: Folded | None = None  # while the model's forward runs
        self._recomputed: Folded | None = None  # what a recomputation in backward (gradient checkpointing) needs again
        self._frozen_A = KeptCast()

    @torch.no_grad()
    def reset_parameters(self, d_initial: float, identity: bool = True) -> None:
        """Kaiming uniform (a=0) for A and B, s_d = d_initial, s_b = 0; without `identity` s_b is drawn, too."""
        nn.init.kaiming_uniform_(self.A, a=0)
        nn.init.kaiming_uniform_(self.B, a=0)
        self.s_d.fill_(d_initial)
        if identity:
            self.s_b.zero_()
        else:
            self.s_b.normal_(0, 0.1)

    def to_freeze(self) -> list[str]:
        """The projection matrices ("A", "B") that are to freeze by score and have not yet."""
        return [name for name in ("A", "B") if self.adaptive and name not in self.frozen]

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

    def cast_A(self, dtype: torch.dtype) -> Tensor:  # noqa: N802  # the paper's A
        """A in `dtype`; one that does not train is cast once."""
        if self.A.dtype == dtype or self.A.requires_grad or not lies_whole(self.A):
            return self.A.to(dtype)
        return self._frozen_A(self.A, dtype)

    def keep(self, folded: Folded | None) -> None:
        """What `Folding` found for this layer; None ends it."""
        # Past nn.Module's __setattr__, which is slow and would look for parameters.
        self.__dict__["_folded"] = folded
        if folded is not None and folded.with_graph:
            self.__dict__["_recomputed"] = folded

    def _fold(self, x: Tensor) -> Folded:
        """What the model's forward has folded for this layer, if it suits; else folded here and now."""
        folded = self._folded
        if folded is None and in_backward():
            folded = self._recomputed
        dtype = compute_dtype(x.device.type, promoted(x.dtype, self.A.dtype))
        with_graph = torch.is_grad_enabled()
        if folded is not None and folded.A.dtype == dtype and (folded.with_graph or not with_graph):
            return folded
        return Folded(self.cast_A(dtype), fold([self], dtype)[0], with_graph)

    def _traced(self, x: Tensor, base: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """Eq. 1 in plain operators, for a compiler to fuse. It sees the parameters only if nothing is folded."""
        if self._folded is not None:
            A, up = self._folded.A, self._folded.up
        else:
            wide = compute_dtype(x.device.type, torch.promote_types(x.dtype, self.A.dtype))
            A, up = self.A.to(wide), (self.s_b.unsqueeze(1) * self.B * self.s_d).to(wide).T
        h = F.linear(F.dropout(x, self.dropout, self.training).to(A.dtype), A)
        y = base(x.to(dtype))
        return (y + h @ up).to(y.dtype)

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor], dtype: torch.dtype, plain: bool) -> Tensor:
        """Eq. 1: base(x) plus the low-rank path.

        Args:
            x: (..., in).
            base: Computes W0 x, (..., out).
            dtype: In which base is given x.
            plain: base ends in a Linear or Conv1D, whose output and input gradient are fresh tensors
                that nobody else reads, so they may be added to in place, if it is given rows (tokens, in).
        """
        if is_traced():
            return self._traced(x, base, dtype)
        folded = self._fold(x)
        shape, drops = x.shape, self.dropout and self.training
        if torch.is_grad_enabled() and x.requires_grad and not drops:
            x, h = Down.apply(x, folded.A, dtype, plain)
        else:
            if x.dtype != dtype:
                x = x.to(dtype) if x.requires_grad else cast_once(x, dtype)
            if plain:
                x = x.reshape(-1, shape[-1])
            h = F.linear((F.dropout(x, self.dropout) if drops else x).to(folded.A.dtype), folded.A)
        y = base(x)
        # A view's in-place change would make autograd copy the whole gradient.
        in_place = plain and y.is_contiguous() and not y._is_view()
        y = Up.apply(y, h, folded.up, in_place)
        return y.view(*shape[:-1], y.shape[-1]) if plain else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AFLoRAPath:
        self._frozen_A.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None, "_recomputed": None, "_frozen_A": KeptCast()}

    def extra_repr(self) -> str:
        frozen = "".join(sorted(self.frozen)) or "none"
        return f"in={self.A.shape[-1]}, out={self.B.shape[0]}, r={self.B.shape[-1]}, frozen={frozen}"


class AFLoRALayer(nn.Module, BaseTunerLayer):
    """A Linear or Conv1D layer with one `AFLoRAPath` per adapter, by PEFT's conventions."""

    adapter_layer_names = ("aflora",)
    other_param_names = ("r",)
    # PEFT's switch for layers that cast their input to their weights' dtype. A path computes in the wider of both.
    cast_input_dtype_enabled = True

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, guard: FreezingGuard | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.guard = guard or FreezingGuard()
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
        self._half_weight, self._half_bias = KeptCast(), KeptCast()

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        d_initial: float,
        dropout: float,
        frozen: set[str],
        init_weights: bool,
        inference_mode: bool = False,
        adaptive: bool = False,
    ) -> None:
        """Add an adapter; `frozen` names the matrices that stay at their random start."""
        path = AFLoRAPath(self.in_features, self.out_features, r, dropout, frozen, adaptive)
        path.reset_parameters(d_initial, identity=init_weights)
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
        """The adapter's change of the weight, in the weight's layout ((out, in); Conv1D: (in, out)) and B's dtype."""
        return self._change(adapter).to(self.path(adapter).B.dtype)

    def _change(self, adapter: str) -> Tensor:
        """`get_delta_weight` in float32 or better."""
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
                weight.to(torch.promote_types(weight.dtype, torch.float32)) + self._change(name).to(weight.device)
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
                self.set_base_weight((wide - self._change(name).to(weight.device)).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Eq. 1 with the active adapters; `adapter_names` names another one for each example (no training)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(x, adapter_names, args, kwargs)
        active = [name for name in self.active_adapters if name in self.aflora]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if is_traced() or not self._goes_unwatched(active):
            return self._through(x, active, args, kwargs)
        self.guard.check()
        y = self._through(x, active, args, kwargs)
        if torch.is_grad_enabled():
            self.guard.watch(y)
        return y

    def _goes_unwatched(self, active: list[str]) -> bool:
        """Whether matrices train here that should freeze, and nobody freezes them."""
        return (
            self.training
            and self.guard.is_open
            and any(path.get_parameter(m).requires_grad for path in map(self.path, active) for m in path.to_freeze())
        )

    def _mixed(self, x: Tensor, adapter_names: list[str], args: Any, kwargs: Any) -> Tensor:
        """Each example, x[i], through the adapter of its own name; "__base__" is none."""
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has to name one adapter for each example: there are {len(adapter_names)} names and "
                f"{len(x)} examples."
            )
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first.")
        of_name: dict[str, list[int]] = {}
        for i, name in enumerate(adapter_names):
            of_name.setdefault(name, []).append(i)
        parts = [
            self._through(x[rows], [name] if name in self.aflora else [], args, kwargs)
            for name, rows in of_name.items()
        ]
        order = torch.tensor([i for rows in of_name.values() for i in rows], device=x.device).argsort()
        return torch.cat(parts)[order]

    def _through(self, x: Tensor, active: list[str], args: Any, kwargs: Any) -> Tensor:
        hooked = not is_traced() and has_hooks(self.base_layer)
        plain = self.quantization_backend is None and type(self.base_layer) in (nn.Linear, Conv1D) and not hooked
        call = self._half_base(x, plain) or partial(self._call_base, args=args, kwargs=kwargs)
        # Hooks are to see what they would see without an adapter: autocast casts behind them.
        dtype = x.dtype if hooked else compute_dtype(x.device.type, x.dtype)
        for name in active:
            call = partial(self.aflora[name], base=call, dtype=dtype, plain=plain)
        return call(x)

    def _call_base(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs)

    def _half_base(self, x: Tensor, plain: bool) -> Callable[[Tensor], Tensor] | None:
        """The base layer with its weight cast once and for all, where autocast would cast it at every call.

        Autocast keeps the casts of weights that train, never of frozen ones. Autograd holds them from
        forward to backward, so that between steps they cost no memory at the peak; where it does not
        (no gradients, gradient checkpointing) nothing is kept. None where the layer has to be called
        itself: it trains, is sharded, hooked or quantized, or nothing is to be cast.
        """
        base = self.base_layer
        if not plain or is_traced() or not torch.is_autocast_enabled(x.device.type) or not keeps_all_for_backward():
            return None
        weight: Any = base.weight
        bias: Any = base.bias
        dtype = torch.get_autocast_dtype(x.device.type)
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        if not frozen or weight.dtype != torch.float32 or not lies_whole(weight):
            return None
        weight = self._half_weight(weight, dtype)
        bias = None if bias is None else self._half_bias(bias, dtype)
        return partial(F.linear, weight=weight.T if isinstance(base, Conv1D) else weight, bias=bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AFLoRALayer:
        self._half_weight.forget()
        self._half_bias.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_half_weight": KeptCast(), "_half_bias": KeptCast()}

    def __repr__(self) -> str:
        return "aflora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class AFLoRALinear(AFLoRALayer):
    """What the tuner makes. PEFT's "all-linear" finds adapted layers by "Linear" in the name of their class."""
