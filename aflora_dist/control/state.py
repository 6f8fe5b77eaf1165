"""Freezing as a part of what survives a restart: which matrices froze when, averages, and values that do not train."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from ..adapter.freezable import frozen_before, frozen_by_training, remember_frozen
from ..engines import Engine, Renamed
from ..errors import AFLoRAError
from ..freezing import FreezeEvent, FreezingConfig, policy_for
from .freezable import Freezable
from .prefix import Prefix
from .scores import scores_for


class FreezingState:
    """All that changes while parameters freeze, besides the clock's and the engine's.

    Args:
        numels: Elements of each parameter that may freeze, by name.
        own: Names of the adapter's own parameters, which are saved whether they train or not.
        told: Who hears of what has frozen.

    Attributes:
        events: All freeze events so far; what has frozen is what they say.
        policy: Which matrices are next.
        prefix: The blocks that freeze whole from the bottom, where they do.
        moments: When something may freeze, as far as it is known before.
        scores: Of the matrices that still train.
    """

    def __init__(
        self,
        engine: Engine,
        config: FreezingConfig,
        numels: Mapping[str, int],
        own: Collection[str],
        told: Sequence[Freezable],
    ) -> None:
        self._engine, self._config, self._numels, self._own, self._told = engine, config, numels, own, told
        self._before, self._earlier = frozen_before(engine.model), frozen_by_training(engine.model)
        self.events: list[FreezeEvent] = []
        self.policy = policy_for(config, list(numels))
        self.prefix = Prefix(engine, list(numels), config) if config.prefix and numels else None
        self.moments = config.moments(len(self.policy), len(self.prefix.blocks) if self.prefix else 0)
        engine.keep(self.fixed(()))
        self.scores = scores_for(engine, config, numels)

    @property
    def frozen(self) -> dict[str, int]:
        """What has frozen, with the step after which it did."""
        return {name: event.step for event in self.events for name in event.frozen}

    @property
    def remaining(self) -> list[str]:
        """Freezable matrices that still train."""
        frozen = self.frozen
        return [name for name in self._numels if name not in frozen]

    def tell(self) -> None:
        """Tell all who are concerned what has frozen so far, a later training of the model among them."""
        remember_frozen(self._engine.model, self._earlier.union(self.frozen))
        for each in self._told:
            each.have_frozen(self.frozen)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Averages ("smoothed/NAME", "uncertainty/NAME") and what does not train: frozen, or never did ("fixed/NAME").

        Of the events what a restart needs: not their scores, which `on_freeze` was told.
        """
        tensors = self.scores.snapshot()
        fixed = self.fixed(self._engine.trainable)
        tensors |= {f"fixed/{name}": value for name, value in self._engine.gather(fixed).items()}
        record = self.record()
        for event in record["events"]:
            event["scores"] = {}  # of N matrices N * N / 2 numbers
        return tensors, record

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what `snapshot` gave; the engine has been restored. A collective."""
        self.events = [FreezeEvent(**event) for event in record["events"]]
        trains = {*self._engine.trainable}
        known = {n for n in record["frozen_before"] if n in self._engine.parameters and n not in trains}
        self._before |= known  # in a process of before, whose values these are
        self._earlier |= known
        fixed = self.fixed(self._engine.trainable)
        self._engine.assign(Renamed(tensors, {name: f"fixed/{name}" for name in fixed}), fixed)
        self.go_on(tensors, record)

    def go_on(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """`restore` where somebody else has restored all weights. A collective."""
        self.events = [FreezeEvent(**event) for event in record["events"]]
        self.tell()
        if self.prefix is not None:
            self.prefix.restore(self.frozen)
        self.scores.restore(tensors, self.remaining, record["window"])
        self.policy.load_state(record["policy"])

    def check(self, record: Mapping[str, Any]) -> None:
        """Look whether `restore` can go on from this record; nothing changes.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        theirs_config = FreezingConfig(**record["config"])
        for option in fields(theirs_config):
            here, there = getattr(self._config, option.name), getattr(theirs_config, option.name)
            if there != here and (option.name != "seed" or theirs_config.score == "random"):
                raise AFLoRAError(
                    f"The checkpoint is of another schedule: {option.name} is {there} there and {here} here."
                )
        mine, theirs = self._numels, record["numels"]
        for name in sorted({*mine, *theirs}):
            if name in record["frozen_before"]:
                raise AFLoRAError(
                    f"{name} had frozen, in an earlier training, when that of the checkpoint began, and trains here: "
                    f"switch it off (requires_grad_(False)) before the optimizer is created."
                )
            if mine.get(name) != theirs.get(name):
                raise AFLoRAError(
                    f"The checkpoint is of another model: {name} has {theirs.get(name, 'no')} elements there and "
                    f"{mine.get(name, 'no')} here."
                )

    def record(self) -> dict[str, Any]:
        """Events with all that they say, and what `check` compares. A collective."""
        return {
            "events": [asdict(event) for event in self.events],
            "config": asdict(self._config),
            "numels": self._numels,
            "frozen_before": sorted(self._before),
            "window": self.scores.record(),
            "policy": self.policy.state(),
        }

    def select(self, record: Mapping[str, Any]) -> None:
        """Train what trained when this was recorded, so that the optimizer's state can be loaded. A collective.

        Raises:
            AFLoRAError: As `check`.
        """
        self.check(record)
        frozen = self._before.union(*(event["frozen"] for event in record["events"]))
        wanted = [name for group in self._engine.members for name in group if name not in frozen]
        if set(wanted) != set(self._engine.trainable):
            self._engine.select(wanted)

    def load_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring the weights back to an earlier snapshot of this training; nothing else changes. A collective.

        What has frozen since gets the value that it trained at then, and stays frozen.

        Args:
            tensors: On the main process: of `Progress.snapshot`.
        """
        engine, trains = self._engine, self._engine.trainable
        values = [p for p in engine.pieces(trains, every_copy=True) if p.key.startswith("value/")]
        engine.fill(tensors, [f"value/{name}" for name in trains], values)
        engine.synchronise(trains)
        fixed = self.fixed(trains)
        then = {name: key for name in fixed for key in (f"value/{name}", f"fixed/{name}") if key in tensors}
        engine.assign(Renamed(tensors, then), fixed)

    def fixed(self, trainable: Sequence[str]) -> list[str]:
        """Names of the parameters that do not train, and are not the base model's."""
        trains, ours = set(trainable), {*self._own, *self._numels, *self._before}
        ours = ours.union(*(self.prefix.blocks if self.prefix else ()))
        return [name for name in self._engine.parameters if name in ours and name not in trains]
