"""Eq. 1 of the paper: first as it stands there, then the module that computes it. Knows nothing of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.torch import in_backward, is_traced
from .casts import KeptCast, cast_once, compute_dtype, lies_whole, promoted
from .eq1 import Down, Fold, Layout, Up


def equation_1(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, s_d: Tensor, s_b: Tensor) -> Tensor:
    """h = W0 x + Lambda_b B Lambda_d A x, with Lambda_d = diag(s_d) and Lambda_b = diag(s_b).

    To read, and for tests to compare with: `AFLoRAPath` computes the same in fewer and cheaper steps (eq1.py).

    Args:
        x: (..., in).
        W0: The frozen weight, (out, in).
        A, B: The projection matrices, (r, in) and (out, r).
        s_d, s_b: The vectors, (r,) and (out,).
    """
    Ax = x @ A.T  # (..., r)
    BAx = (s_d * Ax) @ B.T  # B Lambda_d A x: (..., out)
    return x @ W0.T + s_b * BAx


def lora_up(B: Tensor, s_d: Tensor, s_b: Tensor) -> Tensor:
    """Lambda_b B Lambda_d, (out, r), in float32 or better: with A a plain LoRA that computes the same."""
    B, s_d, s_b = (p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in (B, s_d, s_b))
    return (s_b.unsqueeze(1) * B * s_d).contiguous()


@dataclass(frozen=True)
class Folded:
    """One layer's matrices in the dtype to compute in: A (r, in) and up = (s_b B s_d)^T (r, out).

    Attributes:
        with_graph: Gradients flow from here to the parameters.
        versions: Of the parameters that it was made of.
    """

    A: Tensor
    up: Tensor
    with_graph: bool
    versions: tuple[int, ...] = ()


@lru_cache(maxsize=64)
def _layout(outs: tuple[int, ...], device: torch.device) -> Layout:
    return Layout(outs, device)


def fold(paths: list[AFLoRAPath], dtype: torch.dtype, *, apart: bool = False) -> list[Tensor]:
    """(s_b B s_d)^T of each path, (r, out). All on one device, with one rank r; equal sizes side by side.

    Args:
        apart: In the graph each layer has a node of its own, so that the backward pass reaches the parameters of those
            layers alone that were called.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not apart):
        found = list(Fold.apply(dtype, _layout_of(paths), None, *_vectors_and_B(paths)))
    if not apart or not torch.is_grad_enabled():
        return found
    return [
        Fold.apply(dtype, _layout_of([path]), known, *_vectors_and_B([path]))[0]
        for path, known in zip(paths, found, strict=True)
    ]


def _layout_of(paths: list[AFLoRAPath]) -> Layout:
    return _layout(tuple(path.B.shape[0] for path in paths), paths[0].B.device)


def _vectors_and_B(paths: list[AFLoRAPath]) -> list[nn.Parameter]:  # noqa: N802  # the paper's B
    return [getattr(path, name) for name in ("s_b", "s_d", "B") for path in paths]


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
        up = lora_up(self.B, self.s_d, self.s_b)
        return up @ self.A.detach().to(up.dtype)

    def cast_A(self, dtype: torch.dtype) -> Tensor:  # noqa: N802  # the paper's A
        """A in `dtype`; one that does not train is cast once."""
        if self.A.dtype == dtype or self.A.requires_grad or not lies_whole(self, self.A):
            return self.A.to(dtype)
        return self._frozen_A(self.A, dtype)

    def keep(self, folded: Folded | None) -> None:
        """What `Folding` found for this layer; None ends it."""
        # Past nn.Module's __setattr__, which is slow and would look for parameters.
        self.__dict__["_folded"] = folded
        if folded is not None and folded.with_graph:
            self.__dict__["_recomputed"] = folded

    def versions(self) -> tuple[int, ...]:
        """Change when a parameter is written to; inference tensors have none, and no backward pass."""
        return tuple(p._version for p in (self.A, self.B, self.s_d, self.s_b) if not p.is_inference())

    def _fold(self, x: Tensor) -> Folded:
        """What the model's forward has folded for this layer, if it suits; else folded here and now."""
        folded = self._folded
        if folded is None and in_backward():
            known = self._recomputed
            folded = known if known is not None and known.versions == self.versions() else None
        elif folded is None:  # what is recomputed next may be of this forward, and not of one of the whole model
            self.__dict__["_recomputed"] = None
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

    def train(self, mode: bool = True) -> AFLoRAPath:
        """As torch's. Around an evaluation averages of weights are swapped in, often by `.data`, which nobody sees."""
        if mode != self.training:
            self._frozen_A.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AFLoRAPath:
        self._frozen_A.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None, "_recomputed": None, "_frozen_A": KeptCast()}

    def extra_repr(self) -> str:
        frozen = "".join(sorted(self.frozen)) or "none"
        return f"in={self.A.shape[-1]}, out={self.B.shape[0]}, r={self.B.shape[-1]}, frozen={frozen}"
