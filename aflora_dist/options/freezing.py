"""The options of freezing, said once: for the command line, for loops of one's own, and for Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, TypedDict

from ..errors import AFLoRAError
from .checked import AT_LEAST_ONE, DECAY, NOT_NEGATIVE, Checked

# Importances to score a matrix by (Fig. 4), shapes of the schedule, and rules.
ScoreKind = Literal["gradient", "sensitivity", "relative"]
ScheduleShape = Literal["cubic", "quadratic"]
FreezingRule = Literal["rank", "quantile"]


class FreezingKeywords(TypedDict, total=False):
    """The fields of `FreezingOptions`, for signatures that take them as keywords."""

    beta1: float
    beta2: float
    score: ScoreKind
    pairwise: bool
    every: int
    shape: ScheduleShape
    rule: FreezingRule


@dataclass(frozen=True, kw_only=True)
class FreezingOptions(Checked):
    """How matrices are scored and which freeze (Eq. 2-5), whatever the unit of time.

    Args:
        beta1: Decay of the smoothed gradient (Eq. 2).
        beta2: Decay of its uncertainty (Eq. 3).
        score: gradient |g| (the paper's choice), sensitivity |w g|, or relative |g / w| (Fig. 4).
        pairwise: Freeze A and B of a layer together (Table 6).
        every: Updates from one decision to the next; 1 is the paper's rule. More means fewer, larger freezes, where
            each is dear: a model compiled under ZeRO-3 or FSDP2 is compiled anew at each.
        shape: How the frozen fraction grows between t_i and t_f: cubic (Eq. 5), or quadratic, x^2, as in the authors'
            scripts for language models.
        rule: Who freezes at a decision: rank, the paper's (Eq. 5), or quantile, as in the authors' scripts: matrices
            whose mean score lies below the r(t)-quantile of the elements of those still training, gradients
            averaged over the `every` updates before (theirs is 10).
    """

    beta1: float = field(default=0.85, metadata=DECAY)
    beta2: float = field(default=0.95, metadata=DECAY)
    score: ScoreKind = "gradient"
    pairwise: bool = False
    every: int = field(default=1, metadata=AT_LEAST_ONE)
    shape: ScheduleShape = "cubic"
    rule: FreezingRule = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule == "quantile" and self.pairwise:
            raise AFLoRAError(f"{self.prefix}rule=quantile judges each matrix on its own; drop pairwise.")

    def keywords(self) -> FreezingKeywords:
        """These options alone, without what a subclass adds."""
        return {option.name: getattr(self, option.name) for option in fields(FreezingOptions)}  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class FreezingScheduleConfig(FreezingOptions):
    """When matrices freeze and by which score (Eq. 2-5).

    Args:
        initial_epochs: t_i in epochs: before it nothing freezes. By default one epoch, as in the
            paper, or a tenth of the training where that is less.
        final_epochs: t_f in epochs: all are frozen during the last t_f. By default 70% of the training.
    """

    prefix: ClassVar[str] = "freezing."

    initial_epochs: float | None = field(default=None, metadata=NOT_NEGATIVE)
    final_epochs: float | None = field(default=None, metadata=NOT_NEGATIVE)

    def epochs(self, total: int) -> tuple[float, float]:
        """t_i and t_f for a training of so many epochs."""
        initial = min(1.0, 0.1 * total) if self.initial_epochs is None else self.initial_epochs
        return initial, 0.7 * total if self.final_epochs is None else self.final_epochs
