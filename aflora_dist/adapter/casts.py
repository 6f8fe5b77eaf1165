"""Inputs and parameters in the dtype to compute in, cast no more often than they change."""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch import Tensor, nn

from ..compat.deepspeed import is_sharded
from ..compat.torch import is_fsdp_managed


def lies_whole(module: nn.Module, *own: Tensor) -> bool:
    """Whether a module's own parameters (or these of them) can be read outside of its forward, and kept.

    Those that are sharded, or on the meta device, cannot.

    During a forward pass ZeRO-3 gathers one that is read by name outside of its module's own, one after the other, and
    has the module around it gather it from then on. FSDP2 may leave gathered ones on a module after a forward without a
    backward pass, as in an evaluation, and takes their memory away in the midst of the next backward pass.
    """
    return not is_fsdp_managed(module) and all(
        type(p) is nn.Parameter and not p.is_meta and not is_sharded(p) for p in own or module.parameters(recurse=False)
    )


class _LastCast:
    """The latest cast of an input, as long as the input lives: query, key and value are projected from the same."""

    def __init__(self) -> None:
        self._latest: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # replaced whole: threads may race

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in `dtype`, without autograd."""
        if x.is_inference() or torch.is_inference_mode_enabled():  # which has no version, or makes what has none
            return x.to(dtype)
        if (latest := self._latest) is not None:
            source, version, cast = latest
            if source() is x and version == x._version and cast.dtype == dtype:
                return cast
        cast = x.detach().to(dtype)
        self._latest = weakref.ref(x, self._forget), x._version, cast
        return cast

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if (latest := self._latest) is not None and latest[0] is source:
            self._latest = None


cast_once = _LastCast()


class KeptCast:
    """The cast of a parameter that does not train, made once and kept for as long as the parameter stays what it is.

    A change that torch does not count, one through `.data`, is not seen: who keeps one has it `forget` where those are
    usual.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter in `dtype`, without gradient."""
        if (kept := self._kept) is not None:
            source, version, cast = kept  # holding the source keeps its address from being used again
            same = source.data_ptr() == parameter.data_ptr() and version == parameter._version
            if same and cast.dtype == dtype and cast.shape == parameter.shape:
                return cast
        cast = parameter.detach().to(dtype)
        if not cast.is_inference():  # which no later training could use
            self._kept = parameter.detach(), parameter._version, cast
        return cast

    def forget(self) -> None:
        self._kept = None


def compute_dtype(device: str, default: torch.dtype) -> torch.dtype:
    """Autocast's dtype where it is on for the device, else the default. float64 is nothing that autocast touches."""
    if default != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return default


@cache
def promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """torch.promote_types, which goes through the dispatcher at every call."""
    return torch.promote_types(a, b)
