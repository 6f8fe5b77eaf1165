"""What the training loop asks of a method. Knows no engine and no task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from accelerate import Accelerator
from torch import Tensor, nn

from ..control import AdaptiveFreezing, FreezingConfig, Progress
from ..freezing import Moments
from ..options import Config


@dataclass
class NoControl:
    """What a method does while training goes on, besides the gradient steps: nothing, for who derives from it.

    Attributes:
        freezable, frozen: Parameters that may stop training; those that have, with the step after which they did.
        events: What happened so far, one for each line of freeze_log.jsonl.
        seconds: Host time spent so far.
        moments: When they may stop; None if nothing ever does.
    """

    freezable: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    moments: Moments | None = None

    def scores(self) -> Mapping[str, float]:
        """A number for each parameter that may still stop training. A collective.

        Raises:
            DivergedError: One is not finite; on every rank.
        """
        return {}

    def metrics(self) -> Mapping[str, float]:
        """What it adds to a line of metrics.jsonl."""
        return {}

    def interrupted(self) -> None:
        """The training ends early, on purpose, and will go on from a checkpoint."""


Control: TypeAlias = AdaptiveFreezing | NoControl


class Method(Protocol):
    """A way of fine-tuning. Who derives from it refuses nothing, and does nothing while training goes on.

    Attributes:
        name: What result.json calls it.
    """

    name: str

    def adapt(self, model: Any, head: Sequence[str]) -> Any:
        """The model with what trains in it; the modules named by `head` are new and train whole.

        Raises:
            AFLoRAError: It does not fit this model.
        """

    def is_head(self, name: str) -> bool:
        """Whether a parameter of the adapted model trains whole beside the method, at the head's learning rate."""

    def check(self, updates_per_epoch: int) -> None:
        """Raise AFLoRAError for what can be refused before the model is prepared."""

    def check_engine(self, kind: str, precision: str) -> None:
        """Raise UnsupportedEngineError where the method cannot be trained exactly.

        Args:
            kind: See `Engine.kind`.
            precision: accelerate's mixed_precision.
        """

    def attach(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, progress: Progress, log: Callable[[Any], None]
    ) -> Control:
        """What it does while training; `log` takes each of its events. A collective."""
        return NoControl()

    def saved(self, name: str, trains: bool) -> bool:
        """Whether the adapter's folder holds this parameter; `trains`: whether it did before anything froze."""

    def save(self, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the adapter's folder. On the main process only.

        Args:
            model: As `adapt` gave it; its own values may be elsewhere.
            values: Of the parameters that are `saved`, whole, by name.
        """


class FreezingMethod(Method):
    """A method whose parameters may freeze while they train (`freezing.*`).

    Attributes:
        freezing: Schedule and score, once `check` knows how long the training is; None where nothing freezes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.freezing: FreezingConfig | None = None

    def check(self, updates_per_epoch: int) -> None:
        if self.config.freezes:
            self.freezing = self.schedule(updates_per_epoch)

    def schedule(self, updates_per_epoch: int) -> FreezingConfig:
        """`freezing.*` in updates. What freezes only without being asked to trains from the first to the last."""
        freezing, train = self.config.freezing, self.config.train
        if not self.config.freezes:
            freezing = replace(freezing, initial_epochs=0, final_epochs=0)
        return FreezingConfig.of_epochs(freezing, updates_per_epoch, train.updates(updates_per_epoch), train.seed)

    def attach(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, progress: Progress, log: Callable[[Any], None]
    ) -> Control:
        if self.freezing is None:
            return NoControl()
        return AdaptiveFreezing(
            accelerator,
            model,
            optimizer,
            self.freezing,
            freezable=self.config.freezing.freezable,
            on_freeze=log,
            progress=progress,
        )
