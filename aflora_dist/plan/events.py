"""Which freezes there will be: steps and numbers of matrices are certain, their sizes lie between bounds. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
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
        freezes: How many matrices; with `prefix`, what else freezes with a block counts, too.
        remaining: How many matrices still train afterwards.
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
        policy: How many units (matrices, or layers or blocks of them) freeze one after the other.
        numels: Elements of each freezable matrix.
        trainable: Elements that train at the start.
        order: Names of the units as they freeze; None where the scores will say.
        prefix: r_p(t), where something freezes besides (`freezing.prefix`).
        blocks: Then, from the bottom: names of all that trains of a block, with their elements.
    """

    def __init__(
        self,
        schedule: CubicSchedule,
        policy: FreezingPolicy,
        numels: Mapping[str, int],
        trainable: int,
        order: Sequence[str] | None = None,
        prefix: CubicSchedule | None = None,
        blocks: Sequence[Mapping[str, int]] = (),
    ) -> None:
        self.schedule, self.trainable, self.order = schedule, trainable, order
        self._of_unit, self._matrices, self._units = policy.units, len(numels), len(policy)
        sizes = {unit: sum(numels[name] for name in names) for unit, names in policy.units.items()}
        self._likely = list(order) if order is not None else sorted(sizes, key=lambda unit: sizes[unit])
        ordered = [sizes[unit] for unit in self._likely]
        self._least = [0, *accumulate(ordered)]
        self._most = self._least if order is not None else [0, *accumulate(reversed(ordered))]
        self._blocks = blocks
        self._rests = [[name for name in block if name not in numels] for block in blocks]
        besides = (sum(block[name] for name in rest) for block, rest in zip(blocks, self._rests, strict=True))
        self._beside = [0, *accumulate(besides)]
        self.counts = schedule.growth(self._units)  # (t, frozen from then on)
        self._allowed = prefix.growth(len(blocks)) if prefix else []
        # (t, units frozen, blocks frozen whole from then on), wherever one of them grows, as far as that is certain.
        self._certain = [(step, units, 0) for step, units in self.counts] if order is None else self._walk(order)

    def _walk(self, order: Sequence[str]) -> list[tuple[int, int, int]]:
        counts, allowed = dict(self.counts), dict(self._allowed)
        place = {name: i for i, unit in enumerate(order, 1) for name in self._of_unit[unit]}
        done = [max(place.get(name, 0) for name in block) for block in self._blocks]
        units = blocks = permitted = 0
        found: list[tuple[int, int, int]] = []
        for step in sorted({*counts, *allowed}):
            units, permitted, before = counts.get(step, units), allowed.get(step, permitted), (units, blocks)
            while blocks < len(done) and done[blocks] <= units and (blocks < permitted or not self._rests[blocks]):
                blocks += 1
            if (units, blocks) != before:
                found.append((step, units, blocks))
        return found

    @property
    def events(self) -> list[PlannedFreeze]:
        """All that are certain: all, but for those with `prefix` of a block's rest alone while scores are awaited."""
        each = self._matrices // max(self._units, 1)  # where the scores will say, units are taken to be of one size
        found: list[PlannedFreeze] = []
        frozen, whole, remaining = 0, 0, self._matrices
        for step, units, blocks in self._certain:
            newly = each * (units - frozen)
            if self.order is not None:
                newly = sum(len(self._of_unit[unit]) for unit in self.order[frozen:units])
            elif units == self._units:
                newly = remaining
            beside, remaining = sum(len(rest) for rest in self._rests[whole:blocks]), remaining - newly
            found.append(PlannedFreeze(step, newly + beside, remaining, self._left(step)))
            frozen, whole = units, blocks
        return found

    @property
    def average(self) -> Elements:
        """Over all updates."""
        total = self.schedule.total_steps
        steps = sorted({step for step, *_ in (*self.counts, *self._allowed, *self._certain)})
        parts = [
            (self._left(first - 1), (end - first) / total)
            for first, end in pairwise([0, *(step + 1 for step in steps), total])
        ]
        least, expected, most = (
            sum(getattr(left, kind) * share for left, share in parts) for kind in ("least", "expected", "most")
        )
        return Elements(least, expected, most)

    @property
    def left(self) -> set[str]:
        """Names of the matrices that train to the end; where scores will say which these are, the largest."""
        frozen = _latest(self.counts, self.schedule.total_steps)
        return {name for unit in self._likely[frozen:] for name in self._of_unit[unit]}

    @property
    def beside(self) -> set[str]:
        """Names of what has frozen at the end besides matrices."""
        whole = self._whole(self.schedule.total_steps)[1]
        return {name for rest in self._rests[:whole] for name in rest}

    @property
    def end(self) -> Elements:
        return self._left(self.schedule.total_steps)

    def _whole(self, step: int) -> tuple[int, int]:
        """Of how many blocks all has frozen after the global batch `step`: at least, and at most."""
        if self.order is not None:
            return (_latest([(at, blocks) for at, _, blocks in self._certain], step),) * 2
        permitted = _latest(self._allowed, step)
        return permitted if _latest(self.counts, step) == self._units else 0, permitted

    def _left(self, step: int) -> Elements:
        """What trains after the global batch `step`."""
        frozen = _latest(self.counts, step)
        evenly = self._least[-1] * frozen / max(self._units, 1) if self.order is None else self._least[frozen]
        low, high = (self._beside[blocks] for blocks in self._whole(step))
        return Elements(
            self.trainable - self._most[frozen] - high,
            self.trainable - evenly - (low + high) / 2,
            self.trainable - self._least[frozen] - low,
        )


def _latest(growth: Sequence[tuple[int, int]], step: int) -> int:
    """How many there are after this step."""
    at = bisect_left(growth, step + 1, key=lambda entry: entry[0])
    return growth[at - 1][1] if at else 0
