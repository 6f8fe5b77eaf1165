"""Eq. 2-4 with one number for a whole matrix: I is the mean of |g| over it.

For matrices so large that two float32 for each element would cost more than freezing gives, as in full fine-tuning.
A rank keeps one partial sum for each fragment and step; sums over ranks are taken when something is decided, of all
steps since the last decision at once. Nothing is sent in between, and nothing is kept of a matrix's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import ScoreKind
from .score import OF_VALUES, Fragment


class PartialImportance:
    """This rank's sums of importances, of one bucket of fragments, step by step.

    Args:
        fragments: What this rank observes, in the order in which gradients are passed.
        kind: "gradient" |g|, "sensitivity" |w g| or "relative" |g / w|.
    """

    def __init__(self, fragments: Sequence[Fragment], *, kind: ScoreKind = "gradient") -> None:
        self.fragments = list(fragments)
        self.kind = kind
        self.steps: dict[int, Tensor] = {}  # t -> sums of I, float32, one for each fragment

    @torch.no_grad()
    def observe(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
        scale: Tensor | float = 1.0,
        step: int = 0,
    ) -> None:
        """Take one step's gradients, as `FreezingScore.observe` does."""
        if not self.fragments:
            return
        sums = [
            torch.linalg.vector_norm(i, 1, dtype=torch.promote_types(i.dtype, torch.float32)).float()
            for i in self._importances(gradients, weights)
        ]
        self.steps[step] = torch.stack(sums).mul_(scale)

    def _importances(self, gradients: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Iterable[Tensor]:
        """I of each fragment, but for its sign; only one of them exists at a time, besides the gradients."""
        if self.kind not in OF_VALUES:
            return gradients
        assert weights is not None, "this score needs the weights"
        pairs = zip(gradients, weights, strict=True)
        if self.kind == "sensitivity":
            return (g.float() * w.float() for g, w in pairs)
        assert self.kind == "relative", self.kind
        tiny = torch.finfo(torch.float32).eps
        return (g.float() / w.float().abs().clamp_min(tiny) for g, w in pairs)


class MatrixScore:
    """Ibar and Ubar (Eq. 2, 3) of whole matrices, the same on every rank.

    Args:
        numels: Elements of each matrix, by name.
        beta1, beta2: Decay of Ibar and Ubar.

    Attributes:
        smoothed, uncertainty: Ibar and Ubar, float64 on the CPU, in the order of `numels`; from zero, not
            bias-corrected.
        begun: The step from which on nothing has been taken yet.
    """

    def __init__(self, numels: Mapping[str, int], *, beta1: float = 0.85, beta2: float = 0.95) -> None:
        self.numels = dict(numels)
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = torch.zeros(len(numels), dtype=torch.float64)
        self.uncertainty = torch.zeros(len(numels), dtype=torch.float64)
        self.begun = 0

    def take(
        self, buckets: Sequence[PartialImportance], until: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Eq. 2 and 3 for the steps from `begun` to before `until`; steps without an update are none. A collective.

        Args:
            buckets: What this rank has observed; emptied.
            until: The same on every rank.
            sum_over_ranks: Adds a float64 tensor up over the ranks, in place.
        """
        place = {name: i for i, name in enumerate(self.numels)}
        # One row for each step; the last column counts the buckets that saw it, which is none where it was skipped.
        sums = torch.zeros(until - self.begun, len(place) + 1, dtype=torch.float64)
        for bucket in buckets:
            if not bucket.steps:
                continue
            steps = sorted(bucket.steps)
            seen = torch.stack([bucket.steps[step] for step in steps]).cpu().double()  # one transfer
            rows = torch.tensor(steps) - self.begun
            sums[rows, -1] += 1
            for column, fragment in enumerate(bucket.fragments):
                if fragment.name in place:
                    sums[rows, place[fragment.name]] += seen[:, column]
            bucket.steps.clear()
        sum_over_ranks(sums)
        numels = torch.tensor(list(self.numels.values()), dtype=torch.float64)
        for row in sums:
            if row[-1] > 0:
                importance = row[:-1] / numels
                self.smoothed.lerp_(importance, 1.0 - self.beta1)
                self.uncertainty.lerp_((importance - self.smoothed).abs(), 1.0 - self.beta2)
        self.begun = until

    def scores(self) -> dict[str, float]:
        """Eq. 4, by name."""
        return dict(zip(self.numels, (self.smoothed * self.uncertainty).tolist(), strict=True))

    def keep(self, names: Sequence[str]) -> None:
        """Forget the other matrices."""
        place = {name: i for i, name in enumerate(self.numels)}
        chosen = torch.tensor([place[name] for name in names], dtype=torch.int64)
        self.smoothed, self.uncertainty = self.smoothed[chosen], self.uncertainty[chosen]
        self.numels = {name: self.numels[name] for name in names}

    def record(self) -> dict[str, Any]:
        """All of it that must survive a restart, as JSON can hold it."""
        averages = {"smoothed": self.smoothed.tolist(), "uncertainty": self.uncertainty.tolist()}
        return {"begun": self.begun, "names": list(self.numels), **averages}

    def load(self, record: Mapping[str, Any]) -> None:
        """Go on from what `record` gave, with as many of its matrices as this one has."""
        place = {name: i for i, name in enumerate(record["names"])}
        chosen = [place[name] for name in self.numels]
        self.smoothed = torch.tensor(record["smoothed"], dtype=torch.float64)[chosen]
        self.uncertainty = torch.tensor(record["uncertainty"], dtype=torch.float64)[chosen]
        self.begun = record["begun"]
