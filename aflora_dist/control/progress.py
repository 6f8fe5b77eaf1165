"""The one clock of a training, and all of it that must survive a restart.

t counts global batches. A batch whose update was skipped (fp16 overflow) moves it all the same, so that
whatever depends on the position in the training depends on t alone; accumulated micro-batches move nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from ..engines import Engine
from ..engines.base import Record
from ..errors import AFLoRAError, DivergedError


class Part(Protocol):
    """Something with a state of its own that must survive a restart, besides the engine's."""

    def snapshot(self) -> tuple[dict[str, Tensor], Record]:
        """Whole tensors by name on the main process, and on every rank a record that JSON can hold. A collective."""

    def restore(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Go on from what `snapshot` gave, on this or another engine. A collective."""

    def check(self, record: Record) -> None:
        """Raise AFLoRAError if `restore` cannot go on from this record; nothing changes. Who derives: it can."""
        return


class Progress:
    """Counts the global batches of one engine's training, and takes its state as a whole.

    Args:
        engine: Watched from now on.

    Attributes:
        step: t, the global batches done so far.
        skipped: How many of them had no update.
        parts: What else has state, by name.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.precision = str(engine.accelerator.mixed_precision)
        self.step = 0
        self.skipped = 0
        self.parts: dict[str, Part] = {}
        self.after_batch: list[Callable[[], None]] = []  # called while `step` is still the batch's own t
        engine.watch(self._done)

    def close(self) -> None:
        """Stop watching the engine."""
        self.engine.unwatch()

    def _done(self, applied: bool) -> None:
        try:
            for call in self.after_batch:
                call()
        finally:  # the update has been made, whatever a user's on_freeze says
            self.step += 1
            self.skipped += not applied

    # -- the state as a whole ----------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, Tensor], Record]:
        """All that training on needs, whole, as copies. A collective.

        Returns:
            On the main process the tensors of the engine and of all parts, in its CPU memory; none elsewhere. And on
            every rank a record that JSON can hold.

        Raises:
            DivergedError: On every rank: as `check_finite`, or a part has something to say of it.
        """
        parts = {name: part.snapshot() for name, part in self.parts.items()}
        self.check_finite()
        tensors, engine = self.engine.snapshot()
        record: Record = {
            "step": self.step,
            "skipped": self.skipped,
            "kind": self.engine.kind,
            "precision": self.precision,
            "engine": engine,
            "parts": {name: told for name, (_, told) in parts.items()},
        }
        for more, _ in parts.values():
            tensors |= more
        return tensors, record

    def check_finite(self) -> None:
        """Look whether what trains is fit to be saved: asked before anything is. A collective.

        Raises:
            DivergedError: On every rank, naming the first parameter that is not finite.
        """
        if (broken := self.engine.broken()) is not None:
            raise DivergedError(
                f"The training has diverged: {broken} is not finite after step {self.step - 1}, so it is not saved. "
                f"Lower the learning rate."
            )

    def check(self, record: Record) -> None:
        """Look whether `restore` can go on from this record; nothing changes.

        Raises:
            AFLoRAError: It is of another model, optimizer, method or schedule; the message shows the first difference.
        """
        numels = record["engine"]["numels"]
        for name in record["engine"]["names"]:
            here = self.engine.numel(name) if name in self.engine.parameters else "no"
            if here != numels[name]:
                raise AFLoRAError(
                    f"The checkpoint is of another model: {name} has {numels[name]} elements there and {here} here."
                )
        unknown = sorted(set(record["engine"]["names"]) - {n for group in self.engine.members for n in group})
        if unknown:
            raise AFLoRAError(f"The checkpoint is of another model: {unknown[0]} trains there and not here.")
        self.engine.check(record["engine"])
        if different := sorted(record["parts"].keys() ^ self.parts.keys()):
            there, here = ("without", "with") if different[0] in self.parts else ("with", "without")
            raise AFLoRAError(
                f"The checkpoint was written {there} {different[0]}, and this training is set up {here} it. Set up the "
                f"same."
            )
        for name, part in self.parts.items():
            part.check(record["parts"][name])

    def restore(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Go on from what `snapshot` gave, on this or another engine and any number of ranks. A collective.

        Args:
            tensors: On the main process: as `snapshot` gave them, or loaded when asked for.
            record: The same on every rank.

        Raises:
            AFLoRAError: As `check`.
        """
        self.check(record)
        self.engine.restore(tensors, record["engine"])
        if (record["kind"], record["precision"]) == (self.engine.kind, self.precision):
            self.engine.restore_scaling(record["engine"]["scaling"])
        for name, part in self.parts.items():
            part.restore(tensors, record["parts"][name])
        self.step, self.skipped = record["step"], record["skipped"]
