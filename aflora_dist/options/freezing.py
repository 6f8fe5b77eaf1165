"""The options of freezing, said once: for the command line, for loops of one's own, and for Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, TypedDict

from ..errors import AFLoRAError
from .checked import AT_LEAST_ONE, DECAY, NOT_NEGATIVE, SHARE, Checked

# What units are ranked by: importances of their elements (Fig. 4; "change" is GradES's), or an order known before.
ScoreKind = Literal["gradient", "sensitivity", "relative", "change", "random", "front_to_back", "smallest_first"]
ORDERS: tuple[ScoreKind, ...] = ("random", "front_to_back", "smallest_first")
Granularity = Literal["element", "matrix"]
Unit = Literal["matrix", "layer", "block"]
ScheduleShape = Literal["cubic", "quadratic"]
FreezingRule = Literal["rank", "quantile", "threshold"]


class FreezingKeywords(TypedDict, total=False):
    """The fields of `FreezingOptions`, for signatures that take them as keywords."""

    beta1: float
    beta2: float
    score: ScoreKind
    granularity: Granularity
    seed: int | None
    unit: Unit
    pairwise: bool
    every: int
    shape: ScheduleShape
    rule: FreezingRule
    threshold: float
    prefix: bool


@dataclass(frozen=True, kw_only=True)
class FreezingOptions(Checked):
    """How matrices are scored and which freeze (Eq. 2-5), whatever the unit of time.

    Args:
        beta1: Decay of the smoothed gradient (Eq. 2).
        beta2: Decay of its uncertainty (Eq. 3).
        score: What freezes first has the lowest: gradient |g| (the paper's choice), sensitivity |w g|, relative
            |g / w| (Fig. 4), change |g_t - g_(t-1)|; or an order that no gradient decides: random, front_to_back (by
            block), smallest_first.
        granularity: Of Eq. 2-4: element, as in the paper (two float32 for each element), or matrix, where I is the
            mean over the matrix (two numbers for it): for matrices as large as those of full fine-tuning.
        seed: Of the random order. By default that of the training (train.seed, TrainingArguments.seed), so that
            trainings with other seeds have other orders; 0 in a loop of one's own.
        unit: What freezes together: a matrix, the matrices of a layer (A and B, Table 6), or of a block.
        pairwise: An earlier name: true is unit=layer.
        every: Updates from one decision to the next; 1 is the paper's rule. More means fewer, larger freezes, where
            each is dear: a model compiled under ZeRO-3 or FSDP2 is compiled anew at each.
        shape: How the frozen fraction grows between t_i and t_f: cubic (Eq. 5), or quadratic, x^2, as in the authors'
            scripts for language models.
        rule: Who freezes at a decision: rank, the paper's (Eq. 5); quantile, as in the authors' scripts: matrices
            whose mean score lies below the r(t)-quantile of the elements of those still training, gradients
            averaged over the `every` updates before (theirs is 10); or threshold: units whose score has fallen below a
            share of what it was after t_i (t_f is not used).
        threshold: That share.
        prefix: When all of the lowest blocks that freezes by its score has, freeze what else trains there, too, so that
            the backward pass ends above them.
    """

    beta1: float = field(default=0.85, metadata=DECAY)
    beta2: float = field(default=0.95, metadata=DECAY)
    score: ScoreKind = "gradient"
    granularity: Granularity = "element"
    seed: int | None = field(default=None, metadata=NOT_NEGATIVE)
    unit: Unit = "matrix"
    pairwise: bool = False
    every: int = field(default=1, metadata=AT_LEAST_ONE)
    shape: ScheduleShape = "cubic"
    rule: FreezingRule = "rank"
    threshold: float = field(default=0.5, metadata=SHARE)
    prefix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairwise and self.unit == "matrix":
            object.__setattr__(self, "unit", "layer")
        if self.rule == "threshold" and self.threshold <= 0:
            raise AFLoRAError(f"{self.label}threshold={self.threshold}: no score falls below none of its own level.")
        if self.rule == "quantile" and self.unit != "matrix":
            raise AFLoRAError(f"{self.label}rule=quantile judges each matrix on its own; drop pairwise and unit.")
        if self.score in ORDERS and (self.rule != "rank" or self.granularity != "element"):
            option = "rule" if self.rule != "rank" else "granularity"
            raise AFLoRAError(
                f"{self.label}score={self.score} is an order that is known before: drop "
                f"{option}={getattr(self, option)}, which is for scores that change."
            )
        if self.granularity == "matrix" and (self.score == "change" or self.rule == "quantile"):
            option = "score" if self.score == "change" else "rule"
            raise AFLoRAError(
                f"{self.label}{option}={getattr(self, option)} looks at each element: it needs granularity=element."
            )

    def keywords(self, seed: int) -> FreezingKeywords:
        """These options alone, without what a subclass adds; `seed` is the training's."""
        found = {option.name: getattr(self, option.name) for option in fields(FreezingOptions)}
        return {**found, "seed": seed if self.seed is None else self.seed}  # type: ignore[typeddict-item]


@dataclass(frozen=True, kw_only=True)
class FreezingEpochs(FreezingOptions):
    """When what freezes, for who counts epochs.

    Args:
        initial_epochs: t_i in epochs: before it nothing freezes. By default one epoch, as in the
            paper, or a tenth of the training where that is less.
        final_epochs: t_f in epochs: all are frozen during the last t_f. By default 70% of the training.
        prefix_epochs: t_p in epochs: with prefix, all blocks may be frozen whole during the last t_p. By default half
            of t_f.
    """

    length: ClassVar[str] = "num_train_epochs or max_steps"  # who says how long the training is

    initial_epochs: float | None = field(default=None, metadata=NOT_NEGATIVE)
    final_epochs: float | None = field(default=None, metadata=NOT_NEGATIVE)
    prefix_epochs: float | None = field(default=None, metadata=NOT_NEGATIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_epochs is not None and not self.prefix:
            raise AFLoRAError(f"{self.label}prefix_epochs is for {self.label}prefix=true: say that, too, or drop it.")

    def epochs(self, total: float) -> tuple[float, float]:
        """t_i and t_f for a training of so many epochs, or an AFLoRAError; rule=threshold has no t_f."""
        t_i = min(1.0, 0.1 * total) if self.initial_epochs is None else self.initial_epochs
        t_f = 0.7 * total if self.final_epochs is None else self.final_epochs
        t_f = 0.0 if self.rule == "threshold" else t_f
        for name, tail in (("final_epochs", t_f), ("prefix_epochs", self.prefix_epochs or 0.0)):
            if t_i + tail > total + 1e-9:
                default = ", by default 70% of the training" if getattr(self, name) is None and tail else ""
                raise AFLoRAError(
                    f"The freezing schedule does not fit: {self.label}initial_epochs + {self.label}{name}{default} = "
                    f"{t_i:g} + {tail:g}, but the training has {total:g} epochs ({self.length}). Train longer, or "
                    f"lower one of them."
                )
        return t_i, t_f


@dataclass(frozen=True, kw_only=True)
class FreezingScheduleConfig(FreezingEpochs):
    """What freezes while training, when, and by which score (Eq. 2-5).

    Args:
        enabled: Freeze while training. By default AFLoRA does, as adapter.freezing says, and other methods do not.
        freezable: Which parameters may freeze, of those that train: a regular expression that matches whole names. By
            default AFLoRA's projection matrices; of PEFT's other methods what they train in two dimensions and more;
            with method.name=full the weight matrices of attention and feed-forward layers.
    """

    label: ClassVar[str] = "freezing."
    length: ClassVar[str] = "train.epochs or train.max_steps"

    enabled: bool | None = None
    freezable: str | None = None
