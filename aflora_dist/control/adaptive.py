"""Adaptive freezing in a training loop: observe, decide, drop, by itself at every update. Control, and nothing else.

Binds the freezing of Eq. 2-5 to an engine. Knows parameters, and nothing of what adapts a model. The loop stays as
accelerate's documentation writes it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..adapter.freezable import adapter_of, frozen_by_training, hold_frozen, refuse_loaded_to_infer
from ..adapter.precision import beyond_float16, check_precision
from ..adapter.saving import names_to_save, save_peft
from ..engines import Engine, create_engine, rehearse
from ..errors import AFLoRAError, DivergedError, writing
from ..freezing import FreezeEvent, FreezingConfig
from ..options import ORDERS
from ..processes import on_main, refuse_lonely_processes
from .accelerate_state import AccelerateState
from .ending import Ending
from .freezable import Choice, Chosen, Freezable, checked_choice, names_of
from .frozen import KeptFrozen
from .progress import Progress
from .state import FreezingState
from .stopwatch import Stopwatch


class AdaptiveFreezing:
    """Freezes parameters of a model while it trains, on every rank the same.

    Create it after `accelerator.prepare()`, on every rank. From then on each optimizer update is observed, and after a
    global batch at which floor(r(t) N) grows the matrices with the lowest scores stop training and are gone from
    gradients, optimizer and communication. Nothing has to be called: accelerator.save_state and load_state hold the
    freezing, too.

    An AFLoRA adapter with `freezing="never"` or "always", or `freezable="none"`, is left as it is; only steps are
    counted then.

    Args:
        accelerator: The loop's `Accelerator`. Clip with `accelerator.clip_grad_norm_`: scores are taken before that.
        model, optimizer: As `accelerator.prepare()` returned them.
        config: Schedule and score.
        freezable: What may freeze, of what the optimizer trains: names of parameters; a regular expression that
            matches whole names; a function of name and parameter; or an object with the two methods of `Freezable`.
            None: as what adapts the model says. AFLoRA: its projection matrices; PEFT's other tuners: their
            parameters of two dimensions and more; a model without adapter: the weight matrices of attention and
            feed-forward layers of an architecture that this package knows.
        on_freeze: Called with each `FreezeEvent`, on every rank. What it raises on one rank ends all of them.
        progress: The clock of this training where there is one already.

    Attributes:
        seconds: Spent so far on observing, deciding and dropping: of the host, or of the GPU where that works longer.
        moments: When something may freeze, as far as it is known before.
        state: What of this survives a restart, as a part of `progress`.

    Raises:
        UnsupportedEngineError: The engine, a feature of it, or the optimizer cannot be frozen exactly.
        AFLoRAError: Several processes were launched that do not know of each other.
        AFLoRAError: The model has nothing to freeze adaptively, or the ranks disagree.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        config: FreezingConfig,
        *,
        freezable: Choice = None,
        on_freeze: Callable[[FreezeEvent], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        refuse_lonely_processes()
        check_precision(model, accelerator)
        self.config = config
        self.on_freeze = on_freeze
        self.engine: Engine = progress.engine if progress else create_engine(accelerator, model, optimizer)
        refuse_loaded_to_infer(self.engine.model)
        self._adapter = adapter_of(self.engine.model)
        if self._adapter.freezing_attached:
            raise AFLoRAError("This model is frozen by another AdaptiveFreezing already; call its detach() first.")
        held, trained = frozen_by_training(self.engine.model), self.engine.trainable
        if hold_frozen(self.engine.model, held):  # by an earlier training, and PEFT has let them train again since
            self.engine.select([name for name in trained if name not in held])
        self._kept_frozen = KeptFrozen(self.engine.model, model)
        told: list[Freezable] = [self._kept_frozen, self._adapter]
        if (freezable := checked_choice(freezable)) is not None:
            told.append(freezable if isinstance(freezable, Freezable) else Chosen(freezable, self.engine))
        self.freezable = names_of(told[-1], self.engine, config)
        self.schedule = config.schedule()
        self.numels = {name: self.engine.numel(name) for name in self.freezable}
        self._stopwatch = Stopwatch()
        self.engine.agree(f"{config}{self.numels}", "were set up with different models or FreezingConfigs")
        if self.freezable:
            rehearse(self.engine, min(self.freezable, key=self.numels.__getitem__))
        self.state = FreezingState(self.engine, config, self.numels, self._adapter.own, told)
        self.policy, self._prefix, self._scores = self.state.policy, self.state.prefix, self.state.scores
        self.moments, self._own_clock = self.state.moments, progress is None
        self.progress = progress or Progress(self.engine)
        self.engine.observer = None if config.score in ORDERS else self._observe
        self.progress.after_batch.append(self._after_batch)
        self.progress.parts["freezing"] = self.state
        self._adapter.attach(model, self)
        self._kept_frozen.have_frozen(())  # in this training none yet
        self._accelerate = AccelerateState(accelerator, self)
        self._ending = Ending(config.total_steps, speaks=accelerator.is_main_process)
        self._exit = weakref.finalize(self, self._ending.say)

    @property
    def step(self) -> int:
        """t: global batches done so far, those whose update was skipped included."""
        return self.progress.step

    @property
    def events(self) -> list[FreezeEvent]:
        """All freeze events so far; what has frozen is what they say."""
        return self.state.events

    @property
    def frozen(self) -> dict[str, int]:
        """What has frozen, with the step after which it did."""
        return self.state.frozen

    @property
    def remaining(self) -> list[str]:
        """Freezable matrices that still train."""
        return self.state.remaining

    @property
    def seconds(self) -> float:
        return self._stopwatch.seconds

    @seconds.setter
    def seconds(self, total: float) -> None:
        self._stopwatch.seconds = total

    @property
    def trainable_params(self) -> int:
        """Elements that the optimizer updates now."""
        return self.engine.trainable_params

    def optimizer_state_bytes(self) -> int:
        """Bytes of the optimizer's moments over all ranks. A collective."""
        return self.engine.optimizer_state_bytes()

    def scores(self) -> dict[str, float]:
        """Eq. 4 of every matrix that still trains, as of the last update: one all-reduce of as many numbers.

        A collective: call it on every rank.

        Raises:
            DivergedError: A score is not finite; on every rank.
        """
        if not self._scores.names:
            return {}
        scores = self._scores.means()
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if broken:
            raise DivergedError(
                f"The freezing score of {broken[0]} is not finite after step {self.step}: a gradient was NaN or "
                f"infinite. {beyond_float16(self.engine.model)}Lower the learning rate, or look for the step at which "
                f"the loss broke."
            )
        return scores

    def metrics(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of freezing, after the last global batch."""
        frozen = len(self.freezable) - len(self._scores.names)
        fraction = self.schedule.fraction(self.step - 1) if self.freezable else 0.0
        if self.config.rule == "threshold":  # which has no r(t)
            fraction = frozen / max(len(self.freezable), 1)
        return {"frozen": frozen, "freezing_fraction": fraction}

    def detach(self) -> None:
        """Stop observing and freezing. What is frozen stays so; the other matrices may train on, to the end."""
        self._release(waived=True)

    def release(self) -> None:
        """`detach` for who comes back: an AFLoRA model will not train without another AdaptiveFreezing."""
        self._release(waived=False)

    def _release(self, *, waived: bool) -> None:
        self._exit()
        self._accelerate.close()
        if self._own_clock:
            self.progress.close()
        self.engine.observer = None
        self.progress.after_batch = [call for call in self.progress.after_batch if call != self._after_batch]
        self.progress.parts.pop("freezing", None)
        self._adapter.detach(waived=waived)
        self._kept_frozen.take_back()
        if self._prefix is not None:
            self._prefix.take_back()

    def ended(self) -> None:
        """The training is over: warn if it was shorter than the schedule was told."""
        self._exit()

    def interrupted(self) -> None:
        """The training ends here on purpose, and will go on from a checkpoint: nothing is missing."""
        self._exit.detach()

    # -- what is saved -----------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's adapters, whole, as PEFT's `save_pretrained` does on one process. A collective.

        The same call on every engine, on every rank: what PEFT saves (frozen matrices, `modules_to_save`) is gathered
        by name, one parameter after the other, and never the base model; the main process writes. The folder is for
        `PeftModel.from_pretrained`.

        Raises:
            AFLoRAError: On every rank: it cannot be written, or the model holds the adapter but does not save adapters.
            DivergedError: On every rank: what trains is not finite; the folder stays as it was.
        """
        self.progress.check_finite()
        values, path = self.adapter_values(), Path(folder)

        def write() -> None:
            with writing("The adapter", path):
                save_peft(self.engine.model, path, values)

        on_main(self.engine.accelerator, write)

    def adapter_values(self) -> dict[str, Tensor]:
        """What PEFT saves of the model, by name, whole, in CPU memory of the main process. A collective."""
        model, accelerator = self.engine.model, self.engine.accelerator
        return self.engine.gather(on_main(accelerator, lambda: names_to_save(model)))

    # -- checkpoints -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Clock, freeze events and scores, for torch.save. A collective; scores are there on the main process only.

        What accelerator.register_for_checkpointing asks for. Weights and optimizer are accelerate's to save; for the
        whole training by name, which any engine can go on from, see `progress.snapshot()`.
        """
        clock = {"step": self.step, "skipped": self.progress.skipped}
        return {"tensors": self._scores.snapshot(), "record": self.state.record() | clock}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; what was frozen then stops training. A collective.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        record = state["record"]
        self.state.select(record)
        self.state.go_on(state["tensors"], record)
        self.progress.step, self.progress.skipped = record["step"], record["skipped"]

    # -- each global batch -------------------------------------------------------------------

    def _observe(
        self, bucket: int, gradients: Sequence[Tensor], weights: Callable[[], Sequence[Tensor]], scale: Tensor | float
    ) -> None:
        with self._stopwatch.queueing(self._scores.devices[bucket]), torch.profiler.record_function("aflora.observe"):
            self._scores.observe(bucket, gradients, weights, scale, self.step)

    def _after_batch(self) -> None:
        self._scores.done = self.step + 1
        remaining = set(self._scores.names)
        if self.policy.due(self.schedule, self.step, sum(n[0] in remaining for n in self.policy.units.values())):
            self._decide()
        elif self._prefix is not None and (names := self._prefix.due(self.step, remaining)):
            self._freeze(names, {}, self._stopwatch.start(self.engine.device), self.step)
        self._ending.note(self.step + 1, len(self._scores.names))

    def _decide(self) -> None:
        start = self._stopwatch.start(self.engine.device)  # the backward pass and the update are not freezing's
        with torch.profiler.record_function("aflora.decide"):
            scores = self.scores()
            self._scores.tell_of_idle(scores)
            names = self.policy.choose(self.schedule, self.step, scores, self._scores.quantile)
            if self._prefix is not None:
                names += self._prefix.due(self.step, {*scores} - {*names})
            self.engine.agree(f"{self.step}{names}", f"want to freeze different matrices after step {self.step}")
        if names:
            self._freeze(names, scores, start, self.step)
        else:
            self._stopwatch.stop(start, self.engine.device)

    def freeze(self, names: str | Sequence[str]) -> None:
        """Freeze these now, and all of their layer or block (`unit`), whatever the schedule says. A collective.

        Raises:
            AFLoRAError: A name is not that of a freezable matrix that still trains, or nothing else trains.
        """
        chosen = {names} if isinstance(names, str) else {*names}
        if unknown := sorted(chosen - {*self.remaining}):
            raise AFLoRAError(f"{unknown[0]!r} is not a freezable matrix that still trains; see `remaining`.")
        whole = [name for unit in self.policy.units.values() if chosen & set(unit) for name in unit]
        self.engine.agree(f"{self.step}{whole}", "were told to freeze different matrices")
        if whole and not {*self.engine.trainable} - {*whole}:
            raise AFLoRAError("All that trains would freeze, and the next step would have no gradient. Leave one out.")
        if whole:
            self._freeze(whole, {}, self._stopwatch.start(self.engine.device), max(self.step - 1, 0))

    def _freeze(self, names: list[str], scores: dict[str, float], start: float, step: int) -> None:
        """Freeze after the global batch `step`."""
        with torch.profiler.record_function("aflora.rebuild"):
            self._drop(names)
        self.events.append(
            FreezeEvent(
                step=step,
                frozen=names,
                scores=scores,
                remaining=len(self._scores.names),
                trainable_params=self.trainable_params,
                optimizer_state_bytes=self.optimizer_state_bytes(),
                rebuild_seconds=self._stopwatch.stop(start, self.engine.device),
                backward_from=0 if self._prefix is None else self._prefix.frozen,
            )
        )
        self.state.tell()
        self._report(self.events[-1])

    def _drop(self, names: Sequence[str]) -> None:
        """The engine lets go of the matrices, and the scores of the others follow their gradients."""
        moves = self.engine.drop(names)
        self._scores.carry(moves, [name for name in self._scores.names if name not in names])

    def _report(self, event: FreezeEvent) -> None:
        """Call `on_freeze`; an error of one rank (a full disk, say) is everybody's, or the others would wait for it."""
        if self.on_freeze is None:
            return
        failure: Exception | None = None
        try:
            self.on_freeze(event)
        except Exception as error:
            failure = error
        rank = int(self.engine.max_over_ranks(torch.tensor([self.engine.rank if failure else -1])).item())
        if failure is not None:
            raise failure
        if rank >= 0:
            raise AFLoRAError(
                f"on_freeze failed on rank {rank} after step {event.step}; what that rank printed tells why."
            )
