"""Who freezes, and when that is decided. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..options import Unit
from .config import FreezingConfig
from .order import unit_of
from .schedule import CubicSchedule


class FreezingPolicy:
    """The paper's rule: floor(r(t) N) are frozen, the lowest scores first, ties by name.

    Args:
        names: All freezable matrices.
        unit: What freezes together: each "matrix" alone, those of a "layer" (A and B, Table 6), or of a "block". A
            unit's score is the mean of its matrices' scores.

    Attributes:
        units: The matrices of each unit, by its name.
    """

    def __init__(self, names: Sequence[str], *, unit: Unit = "matrix") -> None:
        self.units: dict[str, tuple[str, ...]] = {}
        for name in names:
            of = unit_of(name, unit)
            self.units[of] = (*self.units.get(of, ()), name)

    def __len__(self) -> int:
        """N of Eq. 5: how many units freeze one after the other."""
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
        ranked = self.ranked(scores)
        missing = count - (len(self.units) - len(ranked))
        return [name for unit in ranked[: max(missing, 0)] for name in self.units[unit]]

    def ranked(self, scores: Mapping[str, float]) -> list[str]:
        """The units that still train, by rising score, and name where that is equal."""
        means = self._means(scores)
        return sorted(means, key=lambda unit: (means[unit], unit))

    def _means(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Of each unit that still trains."""
        left = {unit: names for unit, names in self.units.items() if names[0] in scores}
        return {unit: sum(scores[name] for name in names) / len(names) for unit, names in left.items()}

    def state(self) -> dict[str, Any]:
        """What of it must survive a restart, as JSON can hold it."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


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


class ThresholdPolicy(FreezingPolicy):
    """A unit freezes when its score has fallen below a fraction of its own early level: there is no t_f to guess.

    The level is the unit's score after step t_i, the grace period, or the first one above 0. From then on, at every
    step that is a multiple of `every`, the units whose score lies below `threshold` times their level freeze. (As
    GradES, arXiv 2509.01842, but relative to each unit's own level: an absolute threshold does not carry over from one
    model to another.)
    How many freeze, and whether all do, is not known before.

    Args:
        names, unit: As of `FreezingPolicy`.
        threshold: The fraction, in (0, 1).

    Attributes:
        levels: Of each unit, once the grace period is over.
    """

    def __init__(self, names: Sequence[str], *, unit: Unit = "matrix", threshold: float = 0.5) -> None:
        super().__init__(names, unit=unit)
        self.threshold = threshold
        self.levels: dict[str, float] = {}

    def due(self, schedule: CubicSchedule, step: int, remaining: int) -> bool:
        if remaining == 0 or step < schedule.initial_steps:
            return False
        return not self.levels or step % schedule.every == 0

    def choose(
        self, schedule: CubicSchedule, step: int, scores: Mapping[str, float], quantile: Callable[[float], float]
    ) -> list[str]:
        means = self._means(scores)
        for unit, mean in means.items():
            # What is 0 says nothing yet: before the first update s_b is, and no gradient reaches A and B.
            self.levels[unit] = self.levels.get(unit) or mean
        fallen = [unit for unit in means if means[unit] < self.threshold * self.levels[unit]]
        return [name for unit in sorted(fallen, key=lambda u: (means[u], u)) for name in self.units[unit]]

    def state(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.levels = dict(state.get("levels", {}))


def policy_for(config: FreezingConfig, names: Sequence[str]) -> FreezingPolicy:
    """The rule that a configuration names."""
    if config.rule == "threshold":
        return ThresholdPolicy(names, unit=config.unit, threshold=config.threshold)
    return (QuantilePolicy if config.rule == "quantile" else FreezingPolicy)(names, unit=config.unit)
