"""What a plan says, as JSON can hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .events import Elements, PlannedFreeze


@dataclass(frozen=True)
class Steps:
    """How long the training is, and how fast it learns.

    Attributes:
        examples: To train on.
        left_out: Of them in each epoch: the last, incomplete batch.
        tokens: In an epoch, rounded up as batches are; None if not known.
        initial, final: t_i and t_f in updates; None if nothing freezes, final also where a threshold says when.
        warm_up: Updates in which the learning rates rise to their peaks.
        learning_rates: Peaks, by what has them: "adapter" (with method.name=full the model), "head".
    """

    examples: int
    left_out: int
    per_epoch: int
    total: int
    tokens: int | None
    initial: int | None
    final: int | None
    warm_up: int
    learning_rates: dict[str, float]


@dataclass(frozen=True)
class Parameters:
    """What trains, in elements.

    Attributes:
        start, end: Of the method, before the first and after the last freeze.
        average: Over the updates: avg_trainable_params of result.json.
        head: What trains whole beside the method, to the end.
        lora_r8: What LoRA r=8 trains on the same layers.
        model: All elements of the model, trained or not.
        model_bytes: Of the model that is adapted, in the dtype in which it is loaded, unquantised.
    """

    start: int
    average: Elements
    end: int
    head: int
    lora_r8: int
    model: int
    model_bytes: int


@dataclass(frozen=True)
class EnginePlan:
    """What one launch comes to. Bytes are of each rank.

    Attributes:
        refused: Why the run would be; nothing else is known then.
        micro_batches: An update's, on each rank; at least so many where the data were not read.
        optimizer_bytes: The optimizer's moments at the start and at the end: optimizer_state_bytes of freeze_log.jsonl
            is the sum over the ranks.
        score_bytes: Ibar, Ubar and a buffer; none at the end.
        checkpoint_bytes: Of state.safetensors, at the start and at the end.
    """

    engine: str
    ranks: int
    precision: str
    refused: str | None = None
    micro_batches: int = 0
    optimizer_bytes: list[list[int]] = field(default_factory=list)
    score_bytes: list[int] = field(default_factory=list)
    checkpoint_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a run will train, freeze and hold.

    Attributes:
        freezes: Lines of freeze_log.jsonl that there will be.
        matrices: How many will freeze.
        directory, writes: Where the run would write, and what.
        directory_taken: Why the run could not begin in its directory; None if it can.
        assumptions: What was not known and is taken to be so.
    """

    model: str
    task: str
    method: str
    steps: Steps
    parameters: Parameters
    freezes: list[PlannedFreeze]
    matrices: int
    engines: list[EnginePlan]
    directory: str
    writes: list[str]
    directory_taken: str | None
    assumptions: list[str]
