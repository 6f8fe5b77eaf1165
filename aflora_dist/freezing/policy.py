"""Who freezes, and when that is decided. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .schedule import CubicSchedule


class FreezingPolicy:
    """The paper's rule: floor(r(t) N) are frozen, the lowest scores first, ties by name, matrices singly or in pairs.

    Args:
        names: All freezable matrices. Names end in the matrix, ".A" or ".B".
        pairwise: Freeze A and B of a layer together (Table 6); a pair's score is its mean.
    """

    def __init__(self, names: Sequence[str], *, pairwise: bool = False) -> None:
        self.units: dict[str, tuple[str, ...]] = {}
        for name in names:
            unit = name.rpartition(".")[0] if pairwise else name
            self.units[unit] = (*self.units.get(unit, ()), name)

    def __len__(self) -> int:
        """N of Eq. 5: how many matrices, or pairs, freeze one after the other."""
        return len(self.units)

    def due(self, schedule: CubicSchedule, step: int, remaining: int) -> bool:
        """Whether something is to be decided after this step, with so many units still training."""
        return schedule.count(step, len(self)) > len(self) - remaining

    def choose(
        self, schedule: CubicSchedule, step: int, scores: Mapping[str, float], quantile: Callable[[float], float]
    ) -> list[str]:
        """The names to freeze after this step, in order of rising score.

        Args:
            scores: Score of each matrix that is still trainable (Eq. 4).
            quantile: Gives a quantile of all *elements'* scores, of those matrices. A collective.
        """
        return self.next_frozen(scores, schedule.count(step, len(self)))

    def next_frozen(self, scores: Mapping[str, float], count: int) -> list[str]:
        """The names to freeze, in order of rising score, so that `count` units are frozen in all.

        Args:
            scores: Score of each matrix that is still trainable (Eq. 4).
            count: floor(r(t) N).
        """
        remaining = {unit: names for unit, names in self.units.items() if names[0] in scores}
        missing = count - (len(self.units) - len(remaining))
        ranked = sorted(
            remaining, key=lambda unit: (sum(scores[n] for n in self.units[unit]) / len(self.units[unit]), unit)
        )
        return [name for unit in ranked[: max(missing, 0)] for name in self.units[unit]]


class QuantilePolicy(FreezingPolicy):
    """The rule of the authors' scripts (Pruner.mask_with_threshold in their glue/utils.py).

    At every step that is a multiple of `every`, between t_i and T - t_f, and at each after that: of the elements of
    all matrices that still train, take the r(t)-quantile of Ibar * Ubar; matrices whose mean lies below it freeze.
    How many that are is not known before: a mean is above most of its elements where few are large. r(t) applies to
    those that are left, anew each time.
    """

    def due(self, schedule: CubicSchedule, step: int, remaining: int) -> bool:
        if remaining == 0 or step <= schedule.initial_steps:
            return False
        return step % schedule.every == 0 or step > schedule.total_steps - schedule.final_steps

    def choose(
        self, schedule: CubicSchedule, step: int, scores: Mapping[str, float], quantile: Callable[[float], float]
    ) -> list[str]:
        threshold = quantile(schedule.fraction(step))
        return sorted((name for name in scores if scores[name] < threshold), key=lambda name: (scores[name], name))
