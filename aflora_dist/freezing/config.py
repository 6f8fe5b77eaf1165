"""What a user says of freezing, and what is said of each freeze."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import AFLoRAError
from ..options import FREEZING_RULES, SCORE_KINDS, FreezingRule, ScheduleShape, ScoreKind
from .schedule import CubicSchedule


@dataclass(frozen=True, kw_only=True)
class FreezingConfig:
    """When and by which score the projection matrices freeze; steps are global batches.

    Args:
        total_steps: T, the global batches (optimizer updates, skipped ones included) of the whole training.
        initial_steps: t_i, batches before the first matrix may freeze (the paper: one epoch).
        final_steps: t_f, batches at the end with all matrices frozen (the paper: 70% of T).
        beta1, beta2: Decay of the smoothed gradient and of its uncertainty (Eq. 2, 3).
        score: "gradient" |g| (the paper's choice), "sensitivity" |w g| or "relative" |g / w| (Fig. 4).
        pairwise: Freeze A and B of a layer together (Table 6).
        every: Steps from one decision to the next at least; 1 is the paper's rule. More means fewer, larger
            freezes, where each is dear: a model compiled under ZeRO-3 or FSDP2 is compiled anew at each.
        shape: How the frozen fraction grows: "cubic" (Eq. 5), or "quadratic" (the authors' scripts for language
            models).
        rule: Who freezes at a decision: by "rank", the paper's rule (Eq. 5), or by "quantile", as in the authors'
            scripts (see `QuantilePolicy`; their `every` is 10).

    Raises:
        AFLoRAError: The schedule does not fit, or an argument is out of range.
    """

    total_steps: int
    initial_steps: int
    final_steps: int
    beta1: float = 0.85
    beta2: float = 0.95
    score: ScoreKind = "gradient"
    pairwise: bool = False
    every: int = 1
    shape: ScheduleShape = "cubic"
    rule: FreezingRule = "rank"

    def __post_init__(self) -> None:
        self.schedule()
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise AFLoRAError(f"FreezingConfig: {name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.score not in SCORE_KINDS:
            raise AFLoRAError(f"FreezingConfig: score must be one of {', '.join(SCORE_KINDS)}, got {self.score!r}.")
        if self.rule not in FREEZING_RULES:
            raise AFLoRAError(f"FreezingConfig: rule must be one of {', '.join(FREEZING_RULES)}, got {self.rule!r}.")
        if self.rule == "quantile" and self.pairwise:
            raise AFLoRAError("FreezingConfig: rule='quantile' judges each matrix on its own; drop pairwise.")

    @property
    def window(self) -> int:
        """Updates over which the importance is averaged before it is smoothed."""
        return self.every if self.rule == "quantile" else 1

    def schedule(self) -> CubicSchedule:
        return CubicSchedule(
            total_steps=self.total_steps,
            initial_steps=self.initial_steps,
            final_steps=self.final_steps,
            every=self.every,
            shape=self.shape,
        )


@dataclass(frozen=True)
class FreezeEvent:
    """One line of freeze_log.jsonl.

    Attributes:
        step: t, the global batch after which the matrices froze, from 0.
        frozen: Their names, lowest score first.
        scores: Every score that was ranked; empty where `freeze` was called by hand, and of events before a restart
            from a snapshot.
        remaining: Freezable matrices that still train.
        trainable_params: Elements that the optimizer still updates.
        optimizer_state_bytes: Bytes of the optimizer's moments, over all ranks.
        rebuild_seconds: Time for the decision and the drop; on a GPU from the end of the update to that of the drop.
    """

    step: int
    frozen: list[str]
    scores: dict[str, float]
    remaining: int
    trainable_params: int
    optimizer_state_bytes: int
    rebuild_seconds: float
