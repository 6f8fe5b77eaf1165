"""Eq. 2-4: the freezing score of each projection matrix, from its gradients.

Works on whatever fragments of matrices a rank holds, laid out in one flat buffer, so that a step
costs a handful of vector operations however many matrices there are. Returns partial sums; adding
them over ranks and dividing by the sizes is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..options import ScoreKind

# The kinds of I that look at a weight's value, too: it is passed to `observe` for these alone.
OF_VALUES: tuple[ScoreKind, ...] = ("sensitivity", "relative")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int


def averages(window: int, kind: ScoreKind = "gradient") -> list[str]:
    """Names of what a `FreezingScore` with this window keeps, element by element."""
    more = ["importance"] * (window > 1) + ["previous"] * (kind == "change")
    return ["smoothed", "uncertainty", *more]


class FreezingScore:
    """Ibar and Ubar (Eq. 2, 3) of this rank's fragments, float32.

    Args:
        fragments: What this rank observes, in the order in which gradients are passed.
        kind: The importance I (Fig. 4): "gradient" |g|, "sensitivity" |w g|, "relative" |g / w|; or "change"
            |g_t - g_(t-1)| (GradES, arXiv 2509.01842), with a first g_(t-1) of zero.
        beta1, beta2: Decay of Ibar and Ubar.
        window: Steps over which I is averaged before Eq. 2 and 3 take it; 1 is the paper's rule, more the authors'
            scripts'. A window's average is taken when the next one begins.

    Attributes:
        averages: By name: Ibar ("smoothed"), Ubar ("uncertainty"), with a window what has been averaged in it so far
            ("importance"), and for "change" g_(t-1) ("previous"). Float32, all start at zero and are not
            bias-corrected.
        begun, observed: Which window is being averaged, from 0, and how many steps of it have been so far.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        device: torch.device | str,
        *,
        kind: ScoreKind = "gradient",
        beta1: float = 0.85,
        beta2: float = 0.95,
        window: int = 1,
    ) -> None:
        self.fragments = list(fragments)
        self.kind = kind
        self.beta1 = beta1
        self.beta2 = beta2
        self.window = window
        self.begun, self.observed = 0, 0
        numel = sum(fragment.numel for fragment in self.fragments)
        kinds = averages(window, kind)
        self.averages = {name: torch.zeros(numel, dtype=torch.float32, device=device) for name in kinds}
        self.smoothed, self.uncertainty = self.averages["smoothed"], self.averages["uncertainty"]  # Ibar, Ubar
        self._importance = torch.empty(numel, dtype=torch.float32, device=device)

    def spans(self) -> list[tuple[Fragment, int]]:
        """Each fragment, and where it begins in `smoothed` and `uncertainty`."""
        starts = accumulate((fragment.numel for fragment in self.fragments), initial=0)
        return list(zip(self.fragments, starts, strict=False))

    @torch.no_grad()
    def observe(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        scale: Tensor | float = 1.0,
        step: int = 0,
    ) -> None:
        """Eq. 2 and 3 for one step.

        Args:
            gradients: One 1-D tensor per fragment, any float dtype.
            weights: The fragments' values before the update; read for the kinds that need them.
            scale: g is `scale` times what is passed (undoes clipping and loss scaling).
            step: t; with a window, one begins at each multiple of it.
        """
        if self.window > 1 and step // self.window > self.begun:
            self._smooth(self.averages["importance"])
            self.begun, self.observed = step // self.window, 0
        self.observed += 1
        if not self.fragments:
            return
        importance = self._flatten(gradients)
        if self.kind == "change":
            now = importance.mul(scale)
            torch.sub(now, self.averages["previous"], out=importance).abs_()
            self.averages["previous"].copy_(now)
        else:
            importance.abs_().mul_(scale)
        if self.kind in OF_VALUES:
            assert weights is not None, "this score needs the weights"
            magnitude = torch.cat([w.to(torch.float32) for w in weights]).abs_()
            if self.kind == "sensitivity":
                importance.mul_(magnitude)
            else:
                importance.div_(magnitude.clamp_min_(torch.finfo(torch.float32).eps))
        if self.window > 1:
            self.averages["importance"].lerp_(importance, 1.0 / self.observed)
        else:
            self._smooth(importance)

    def _smooth(self, importance: Tensor) -> None:
        """Eq. 2 and 3; overwrites what it is given."""
        self.smoothed.lerp_(importance, 1.0 - self.beta1)
        self.uncertainty.lerp_(importance.sub_(self.smoothed).abs_(), 1.0 - self.beta2)

    def _flatten(self, gradients: Sequence[Tensor]) -> Tensor:
        if all(gradient.dtype == torch.float32 for gradient in gradients):
            return torch.cat(list(gradients), out=self._importance)
        return self._importance.copy_(torch.cat([gradient.to(torch.float32) for gradient in gradients]))

    @torch.no_grad()
    def partial_sums(self) -> dict[str, Tensor]:
        """Sum over this rank's elements of Ibar * Ubar (Eq. 4 before the mean), by name, float64 scalars on the CPU."""
        if not self.fragments:
            return {}
        smoothed, uncertainty = self.smoothed, self.uncertainty
        if smoothed.device.type == "mps":  # which has no float64
            smoothed, uncertainty = smoothed.cpu(), uncertainty.cpu()
        products = (smoothed.double() * uncertainty.double()).split([f.numel for f in self.fragments])
        totals = torch.stack([product.sum() for product in products]).cpu()  # one transfer
        sums: dict[str, Tensor] = {}
        for fragment, total in zip(self.fragments, totals, strict=True):
            sums[fragment.name] = sums[fragment.name] + total if fragment.name in sums else total
        return sums
