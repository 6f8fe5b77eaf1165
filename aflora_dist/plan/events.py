"""Which freezes there will be: steps and numbers of matrices are certain, their sizes lie between bounds. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

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
        counts = [schedule.count(step, self._units) for step in range(schedule.total_steps)]
        before = [0, *counts]  # frozen before each update
        self.counts = [(step, counts[step]) for step in range(len(counts)) if counts[step] > before[step]]
        self._before = before[: len(counts)]

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
        each = [self._left(frozen) for frozen in self._before]
        return Elements(*(sum(getattr(e, kind) for e in each) / len(each) for kind in ("least", "expected", "most")))

    @property
    def end(self) -> Elements:
        return self._left(self.counts[-1][1] if self.counts else 0)

    def _left(self, frozen: int) -> Elements:
        evenly = self._least[-1] * frozen / max(self._units, 1)
        return Elements(
            self.trainable - self._most[frozen], self.trainable - evenly, self.trainable - self._least[frozen]
        )
