"""Which freezes there will be: steps and numbers of matrices are certain, their sizes lie between bounds. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..freezing import CubicSchedule, FreezingPolicy


@dataclass(frozen=True)
class Elements:
    """How many elements train, which depends on the matrices that the scores choose.

    Attributes:
        least, most: If the largest matrices froze first, and if the smallest did.
        expected: If matrices of all sizes froze evenly.
    """

    least: float
    expected: float
    most: float

    def less(self, elements: int) -> Elements:
        return Elements(self.least - elements, self.expected - elements, self.most - elements)


@dataclass(frozen=True)
class PlannedFreeze:
    """A line of freeze_log.jsonl that there will be.

    Attributes:
        step: t, the global batch after which it happens, from 0.
        freezes: How many matrices.
        remaining: How many still train afterwards.
        trainable: Elements that the optimizer then updates, the head's included.
    """

    step: int
    freezes: int
    remaining: int
    trainable: Elements


class Freezes:
    """The freezes of a training.

    Args:
        schedule: When.
        policy: How many units (matrices, or pairs of them) freeze one after the other.
        numels: Elements of each freezable matrix.
        trainable: Elements that train at the start.
    """

    def __init__(
        self, schedule: CubicSchedule, policy: FreezingPolicy, numels: Mapping[str, int], trainable: int
    ) -> None:
        self.schedule, self.trainable = schedule, trainable
        sizes = sorted(sum(numels[name] for name in names) for names in policy.units.values())
        self._least, self._most = [0, *accumulate(sizes)], [0, *accumulate(reversed(sizes))]
        self._units, self._in_unit = len(policy), len(numels) // max(len(policy), 1)
        self.counts = self._counts()  # (t, frozen from then on)

    def _counts(self) -> list[tuple[int, int]]:
        """Found by bisection: of a long training, most updates freeze nothing."""
        steps, step, frozen = range(self.schedule.total_steps), 0, 0
        found: list[tuple[int, int]] = []
        while True:
            step = bisect_left(steps, frozen + 1, lo=step, key=lambda t: self.schedule.count(t, self._units))
            if step == len(steps):
                return found
            frozen = self.schedule.count(step, self._units)
            found.append((step, frozen))

    @property
    def events(self) -> list[PlannedFreeze]:
        found, frozen = [], 0
        for step, count in self.counts:
            newly, remaining = (count - frozen) * self._in_unit, (self._units - count) * self._in_unit
            found.append(PlannedFreeze(step, newly, remaining, self._left(count)))
            frozen = count
        return found

    @property
    def average(self) -> Elements:
        """Over all updates."""
        total = self.schedule.total_steps
        firsts, frozen = [0, *(step + 1 for step, _ in self.counts)], [0, *(count for _, count in self.counts)]
        parts = [
            (self._left(count), (end - first) / total)
            for count, (first, end) in zip(frozen, pairwise([*firsts, total]), strict=True)
        ]
        least, expected, most = (
            sum(getattr(left, kind) * share for left, share in parts) for kind in ("least", "expected", "most")
        )
        return Elements(least, expected, most)

    @property
    def end(self) -> Elements:
        return self._left(self.counts[-1][1] if self.counts else 0)

    def _left(self, frozen: int) -> Elements:
        evenly = self._least[-1] * frozen / max(self._units, 1)
        return Elements(
            self.trainable - self._most[frozen], self.trainable - evenly, self.trainable - self._least[frozen]
        )
