"""Eq. 5: which fraction of the projection matrices is frozen after each step. Pure arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import AFLoRAError
from ..options import ScheduleShape
from ..options.checked import AT_LEAST_ONE, NOT_NEGATIVE, Checked


def whole_steps(initial: float, final: float, total: int) -> tuple[int, int]:
    """t_i and t_f that come as fractions of updates, from epochs, as `CubicSchedule` takes them.

    Rounded, both up perhaps, they may be more than the training that they are not more than: then t_f is what is left.
    """
    t_i, t_f = round(initial), round(final)
    if initial + final <= total * (1 + 1e-9):
        t_f = min(t_f, total - t_i)
    return t_i, t_f


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(Checked):
    """r(t) of Eq. 5, in optimizer updates t = 0 .. T-1.

    Args:
        total_steps: T.
        initial_steps: t_i, the steps before the first matrix may freeze.
        final_steps: t_f, the steps at the end during which all are frozen.
        every: Steps from one decision to the next; 1 is the paper's rule. The decisions lie so that all
            are frozen when the final steps begin, as with any other value.
        shape: With x = (t - t_i) / (T - t_i - t_f): "cubic", 1 - (1 - x)^3, is Eq. 5; "quadratic", x^2, is what the
            authors' scripts for language models do: few freeze early, most late.

    Raises:
        AFLoRAError: T < 1, a negative t_i or t_f, t_i + t_f > T, every < 1, or an unknown shape.
    """

    label: ClassVar[str] = "The freezing schedule: "

    total_steps: int = field(metadata=AT_LEAST_ONE)
    initial_steps: int = field(metadata=NOT_NEGATIVE)
    final_steps: int = field(metadata=NOT_NEGATIVE)
    every: int = field(default=1, metadata=AT_LEAST_ONE)
    shape: ScheduleShape = "cubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        T, t_i, t_f = self.total_steps, self.initial_steps, self.final_steps
        if t_i + t_f > T:
            raise AFLoRAError(
                f"The freezing schedule does not fit: t_i + t_f = {t_i} + {t_f} = {t_i + t_f} steps, but training "
                f"has only T = {T}. Train longer, or lower initial_steps (t_i) or final_steps (t_f)."
            )

    def fraction(self, step: int) -> float:
        """r(t), in [0, 1]."""
        T, t_i, t_f = self.total_steps, self.initial_steps, self.final_steps
        if t_f == 0:  # what trains to the end does so in a loop that goes on after it, too
            step = min(step, T - 1)
        if step >= T - t_f:
            return 1.0
        if step < t_i:
            return 0.0
        x = (step - t_i) / (T - t_i - t_f)
        return x**2 if self.shape == "quadratic" else 1.0 - (1.0 - x) ** 3

    def count(self, step: int, total: int) -> int:
        """How many of `total` matrices are frozen after this step's update: floor(r(t) N) at the latest decision."""
        all_frozen = self.total_steps - self.final_steps
        decided = all_frozen + (step - all_frozen) // self.every * self.every
        return math.floor(self.fraction(decided) * total)

    def growth(self, total: int) -> list[tuple[int, int]]:
        """(t, `count` from then on), found by bisection: of a long training, most updates freeze nothing."""
        steps, step, frozen = range(self.total_steps), 0, 0
        found: list[tuple[int, int]] = []
        while True:
            step = bisect_left(steps, frozen + 1, lo=step, key=lambda t: self.count(t, total))
            if step == len(steps):
                return found
            frozen = self.count(step, total)
            found.append((step, frozen))


@dataclass(frozen=True)
class Moments:
    """When something may freeze, as far as it is known before.

    Attributes:
        total: T, the updates of the training.
        freezes: After which of them something may, rising; where scores decide how much does, all at which they can.
        middle: The one that leaves half of what freezes by its score, by r(t); None where nothing freezes.
    """

    total: int
    freezes: Sequence[int] = ()
    middle: int | None = None
