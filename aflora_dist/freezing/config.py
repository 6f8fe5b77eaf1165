"""What a user says of freezing, and what is said of each freeze."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..errors import AFLoRAError
from ..options import FreezingEpochs, FreezingOptions
from ..options.checked import AT_LEAST_ONE, NOT_NEGATIVE
from .schedule import CubicSchedule, Moments, whole_steps


@dataclass(frozen=True, kw_only=True)
class FreezingConfig(FreezingOptions):
    """When and by which score the projection matrices freeze; steps are global batches.

    Args:
        total_steps: T, the global batches (optimizer updates, skipped ones included) of the whole training.
        initial_steps: t_i, batches before the first matrix may freeze (the paper: one epoch).
        final_steps: t_f, batches at the end with all matrices frozen (the paper: 70% of T).
        prefix_steps: t_p, batches at the end during which, with `prefix`, all blocks may be frozen whole; half of t_f
            if not given.
        Others: As in `FreezingOptions` (the configuration's `freezing`).

    Raises:
        AFLoRAError: The schedule does not fit, or an argument is out of range.
    """

    label: ClassVar[str] = "FreezingConfig: "

    total_steps: int = field(metadata=AT_LEAST_ONE)
    initial_steps: int = field(metadata=NOT_NEGATIVE)
    final_steps: int = field(metadata=NOT_NEGATIVE)
    prefix_steps: int | None = field(default=None, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is None:
            object.__setattr__(self, "seed", 0)
        self.schedule()
        if (t_p := self.prefix_steps) is not None and (not self.prefix or self.initial_steps + t_p > self.total_steps):
            raise AFLoRAError(
                f"FreezingConfig: prefix_steps={t_p} is for prefix=True, and with initial_steps at most total_steps."
            )

    @classmethod
    def of_epochs(cls, options: FreezingEpochs, per_epoch: int, total: int, seed: int) -> FreezingConfig:
        """The options of who counts epochs of so many updates, in a training of `total` updates with this seed.

        Raises:
            AFLoRAError: The schedule does not fit.
        """
        t_i, t_f = options.epochs(total / per_epoch)
        initial, final = whole_steps(t_i * per_epoch, t_f * per_epoch, total)
        t_p = options.prefix_epochs
        return cls(
            total_steps=total,
            initial_steps=initial,
            final_steps=final,
            prefix_steps=None if t_p is None else min(round(t_p * per_epoch), total - initial),
            **options.keywords(seed),
        )

    @property
    def window(self) -> int:
        """Updates over which the importance is averaged before it is smoothed."""
        return self.every if self.rule == "quantile" else 1

    def schedule(self) -> CubicSchedule:
        """r(t): its `fraction(t)`, and `count(t, N)`, how many of N units are frozen after the update of batch t."""
        return CubicSchedule(
            total_steps=self.total_steps,
            initial_steps=self.initial_steps,
            final_steps=self.final_steps,
            every=self.every,
            shape=self.shape,
        )

    def prefix_schedule(self) -> CubicSchedule:
        """r_p(t), the share of the blocks that may have frozen whole: Eq. 5 with t_p in the place of t_f."""
        t_p = self.final_steps // 2 if self.prefix_steps is None else self.prefix_steps
        return replace(self.schedule(), final_steps=t_p)

    def moments(self, units: int, blocks: int = 0) -> Moments:
        """When any of so many units may freeze, or with `prefix` one of so many blocks whole."""
        total, growth = self.total_steps, self.schedule().growth(units)
        if not growth:
            return Moments(total)
        freezes = {step for step, _ in growth}
        if self.rule != "rank":  # by quantiles all have frozen after the first update at which r(t) was 1
            end = total if self.rule == "threshold" else min(total - self.final_steps + 2, total)
            freezes = {*range(self.initial_steps, end)}
        if self.prefix:
            freezes |= {step for step, _ in self.prefix_schedule().growth(blocks)}
        middle, _ = min(growth, key=lambda at: abs(2 * at[1] - units))
        return Moments(total, sorted(freezes), middle)


@dataclass(frozen=True)
class FreezeEvent:
    """One line of freeze_log.jsonl.

    Attributes:
        step: t, the global batch after which the matrices froze, from 0.
        frozen: Their names, lowest score first; then, with `prefix`, what else froze with the lowest blocks.
        scores: Every score that was ranked; empty where `freeze` was called by hand, and of events before a restart
            from a snapshot.
        remaining: Freezable matrices that still train.
        trainable_params: Elements that the optimizer still updates.
        optimizer_state_bytes: Bytes of the optimizer's moments, over all ranks.
        rebuild_seconds: Time for the decision and the drop; on a GPU from the end of the update to that of the drop.
        backward_from: The lowest block that trains, counted from 0; above 0 with `prefix` only.
    """

    step: int
    frozen: list[str]
    scores: dict[str, float]
    remaining: int
    trainable_params: int
    optimizer_state_bytes: int
    rebuild_seconds: float
    backward_from: int = 0
