"""One Linear or Conv1D layer with the low-rank paths of its adapters (path.py), by PEFT's conventions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..compat.peft import in_out_features
from ..compat.torch import has_hooks, is_traced, keeps_all_for_backward
from ..errors import AFLoRAError
from .casts import KeptCast, compute_dtype, lies_whole
from .guard import FreezingGuard
from .path import AFLoRAPath


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
        in_features, out_features = in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise AFLoRAError(f"AFLoRA adapts Linear and Conv1D layers; {type(base_layer).__name__} is neither.")
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

    def paths_in_use(self) -> list[AFLoRAPath]:
        """Those that a forward pass now goes through."""
        if self.disable_adapters or self.merged:
            return []
        return [self.path(name) for name in self.active_adapters if name in self.aflora]

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
            AFLoRAError: With safe_merge, if the sum is not finite; the weight is unchanged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.aflora:
                continue
            merged = self._changed(name, 1)
            if safe_merge and not torch.isfinite(merged).all():
                raise AFLoRAError(f"The merged weight is not finite. The adapter {name} seems to be broken.")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what `merge` added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.aflora:
                self.set_base_weight(self._changed(name, -1))

    def _changed(self, adapter: str, sign: int) -> Tensor:
        """The base weight with the adapter's change added or taken off, summed in float32 or better."""
        weight = self.get_base_weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return torch.add(wide, self._change(adapter).to(weight.device), alpha=sign).to(weight.dtype)

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
            raise AFLoRAError(
                f"adapter_names has to name one adapter for each example: there are {len(adapter_names)} names and "
                f"{len(x)} examples."
            )
        if self.merged:
            raise AFLoRAError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first.")
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
        if not lies_whole(base):
            return None
        weight: Any = base.weight
        bias: Any = base.bias
        dtype = torch.get_autocast_dtype(x.device.type)
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        if not frozen or weight.dtype != torch.float32:
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
