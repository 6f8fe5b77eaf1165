"""Adaptive freezing in a training loop: observe, decide, drop, by itself at every update. Control, and nothing else.

Binds the freezing of Eq. 2-5 to an engine. The loop stays as accelerate's documentation writes it.
"""

from __future__ import annotations

import hashlib
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..adapter import Adapted, AFLoRAPath
from ..adapter.folding import Folding
from ..adapter.precision import beyond_float16, check_precision
from ..adapter.saving import names_to_save, save_peft
from ..engines import Engine, create_engine, place
from ..engines.rehearsal import rehearse
from ..engines.transfer import Piece
from ..errors import AFLoRAError, DivergedError, writing
from ..freezing import FreezeEvent, FreezingConfig, FreezingPolicy, FreezingScore, QuantilePolicy
from ..freezing.quantile import quantile
from ..names import named_modules
from ..notices import logger
from ..processes import on_main, refuse_lonely_processes
from .accelerate_state import AccelerateState
from .progress import Progress
from .stopwatch import Stopwatch


class AdaptiveFreezing:
    """Freezes an AFLoRA model's projection matrices while it trains, on every rank the same.

    Create it after `accelerator.prepare()`, on every rank. From then on each optimizer update is
    observed, and after a global batch at which floor(r(t) N) grows the matrices with the lowest scores
    stop training and are gone from gradients, optimizer and communication. Nothing has to be called:
    accelerator.save_state and load_state hold the freezing, too.

    An adapter with `freezing="never"` or "always", or `freezable="none"`, is left as it is; only
    steps are counted then.

    Args:
        accelerator: The loop's `Accelerator`. Clip with `accelerator.clip_grad_norm_`: scores are
            taken before clipping.
        model, optimizer: As `accelerator.prepare()` returned them.
        config: Schedule and score.
        on_freeze: Called with each `FreezeEvent`, on every rank. What it raises on one rank ends all of them.
        progress: The clock of this training where there is one already.

    Attributes:
        seconds: Spent so far on observing, deciding and dropping: of the host, or of the GPU where that works longer.
        events: All freeze events so far.

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
        on_freeze: Callable[[FreezeEvent], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        refuse_lonely_processes()
        check_precision(model, accelerator)
        self.config = config
        self.on_freeze = on_freeze
        self.engine: Engine = progress.engine if progress else create_engine(accelerator, model, optimizer)
        self._adapted = self._find_adapted(self.engine.model)
        self._paths = _paths(self.engine.model)
        self.engine.keep(self._fixed(()))
        self.freezable = self._find_freezable()
        self.schedule = config.schedule()
        policy = QuantilePolicy if config.rule == "quantile" else FreezingPolicy
        self.policy = policy(self.freezable, pairwise=config.pairwise)
        self.numels = {name: self.engine.numel(name) for name in self.freezable}
        self.frozen: dict[str, int] = {}  # name -> step at which it froze
        self.events: list[FreezeEvent] = []
        self._stopwatch = Stopwatch()
        self._agree(f"{config}{self.numels}", "were set up with different models or FreezingConfigs")
        if self.freezable:
            rehearse(self.engine, min(self.freezable, key=self.numels.__getitem__))
        self._scores = self._new_scores()
        self._own_clock = progress is None
        self.progress = progress or Progress(self.engine)
        self.progress.observer = self._observe
        self.progress.after_batch.append(self._after_batch)
        self.progress.parts["freezing"] = self
        self._adapted.freezing_attached, self._adapted.freezing_waived = True, False
        for root in self._adapted.roots:
            Folding.compiled(model, root)
        self._accelerate = AccelerateState(accelerator, self)
        self._ending = _Ending(config.total_steps, speaks=accelerator.is_main_process)
        self._exit = weakref.finalize(self, self._ending.say)

    @staticmethod
    def _find_adapted(model: nn.Module) -> Adapted:
        adapted = Adapted(model)
        if not adapted.layers:
            raise AFLoRAError("AdaptiveFreezing needs an AFLoRA model: peft.get_peft_model(model, AFLoRAConfig(...)).")
        if adapted.freezing_attached:
            raise AFLoRAError("This model is frozen by another AdaptiveFreezing already; call its detach() first.")
        return adapted

    def _find_freezable(self) -> list[str]:
        of_adapter = {id(parameter) for parameter in self._adapted.freezable_matrices().values()}
        trained = set(self.engine.trainable)
        found = [n for n, p in self.engine.parameters.items() if id(p) in of_adapter and n in trained]
        all_frozen = bool(self._paths) and not of_adapter  # by an earlier training: what is left trains on
        if not found and not all_frozen and self._adapted.freezes:
            raise AFLoRAError(
                "AdaptiveFreezing has nothing to freeze: no projection matrix of the active adapter trains adaptively "
                "and is in the optimizer. Check AFLoRAConfig(freezable=..., freezing='adaptive') and the parameters "
                "that the optimizer was given."
            )
        return found

    @property
    def step(self) -> int:
        """t: global batches done so far, those whose update was skipped included."""
        return self.progress.step

    @property
    def remaining(self) -> list[str]:
        """Freezable matrices that still train."""
        return [name for name in self.freezable if name not in self.frozen]

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
        names = self.remaining
        if not names:
            return {}
        index = {name: i for i, name in enumerate(names)}
        vector = torch.zeros(len(names), dtype=torch.float64)
        for score in self._scores:
            for name, partial in score.partial_sums().items():
                vector[index[name]] += partial
        with torch.profiler.record_function("aflora.all_reduce"):
            self.engine.sum_over_ranks(vector)
        scores = {name: total / self.numels[name] for name, total in zip(names, vector.tolist(), strict=True)}
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
        fraction = self.schedule.fraction(self.step - 1) if self.freezable else 0.0
        return {"frozen": len(self.frozen), "freezing_fraction": fraction}

    def detach(self) -> None:
        """Stop observing and freezing. What is frozen stays so; the other matrices may train on, to the end."""
        self.release()
        self._adapted.freezing_waived = True

    def release(self) -> None:
        """`detach` for who comes back: the model will not train without another AdaptiveFreezing."""
        self._exit()
        self._accelerate.close()
        if self._own_clock:
            self.progress.close()
        self.progress.observer = None
        if self._after_batch in self.progress.after_batch:
            self.progress.after_batch.remove(self._after_batch)
        self.progress.parts.pop("freezing", None)
        self._adapted.freezing_attached = False

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
        tensors = self._gather_scores()
        record = self._record() | {"events": [asdict(event) for event in self.events]}
        return {"tensors": tensors, "record": record | {"step": self.step, "skipped": self.progress.skipped}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; what was frozen then stops training. A collective.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        self.prepare_for(state["record"])
        self._load(state["tensors"], state["record"])
        self.progress.step, self.progress.skipped = state["record"]["step"], state["record"]["skipped"]

    def prepare_for(self, record: Mapping[str, Any]) -> None:
        """Train what trained when this was recorded, so that an optimizer's state of then can be loaded. A collective.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        self.check(record)
        frozen = {name for event in record["events"] for name in event["frozen"]}
        wanted = [name for group in self.engine.members for name in group if name not in frozen]
        if set(wanted) != set(self.engine.trainable):
            self.engine.select(wanted)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Averages ("smoothed/NAME", "uncertainty/NAME") and what of the adapter does not train ("fixed/NAME").

        Of the events what a restart needs: not their scores, which `on_freeze` was told.
        """
        tensors = self._gather_scores()
        fixed = self._fixed(self.engine.trainable)
        tensors |= {f"fixed/{name}": value for name, value in self.engine.gather(fixed).items()}
        return tensors, self._record()

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what `snapshot` gave; the engine has been restored."""
        fixed = self._fixed(self.engine.trainable)
        self.engine.assign(_Renamed(tensors, {name: f"fixed/{name}" for name in fixed}), fixed)
        self._load(tensors, record)

    def load_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring the weights back to an earlier snapshot of this training; nothing else changes. A collective.

        What has frozen since gets the value that it trained at then, and stays frozen.

        Args:
            tensors: On the main process: of `progress.snapshot()`.
        """
        trains = self.engine.trainable
        values = [p for p in self.engine.pieces(trains, every_copy=True) if p.key.startswith("value/")]
        self.engine.fill(tensors, [f"value/{name}" for name in trains], values)
        self.engine.synchronise(trains)
        fixed = self._fixed(trains)
        then = {name: key for name in fixed for key in (f"value/{name}", f"fixed/{name}") if key in tensors}
        self.engine.assign(_Renamed(tensors, then), fixed)

    def check(self, record: Mapping[str, Any]) -> None:
        """Look whether `restore` can go on from this record; nothing changes.

        Raises:
            AFLoRAError: It is of another model or schedule; the message shows the first difference.
        """
        for option in fields(self.config):
            here = getattr(self.config, option.name)
            there = record["config"].get(option.name, option.default)  # an earlier release lacks the newer options
            if there != here:
                raise AFLoRAError(
                    f"The checkpoint is of another schedule: {option.name} is {there} there and {here} here."
                )
        theirs = record["numels"]
        for name in sorted({*self.numels, *theirs}):
            if self.numels.get(name) != theirs.get(name):
                raise AFLoRAError(
                    f"The checkpoint is of another model: {name} has {theirs.get(name, 'no')} elements there and "
                    f"{self.numels.get(name, 'no')} here."
                )

    def _record(self) -> dict[str, Any]:
        begun, observed = self._window()
        return {
            "events": [asdict(replace(event, scores={})) for event in self.events],  # of N matrices N * N / 2 numbers
            "config": asdict(self.config),
            "numels": self.numels,
            "window": {"begun": begun, "observed": observed},
        }

    def _window(self) -> tuple[int, int]:
        """Which window of importances is being averaged, and how many steps of it have been. A collective."""
        if self.config.window == 1:
            return 0, 0
        mine = max(((score.begun, score.observed) for score in self._scores), default=(0, 0))
        begun, observed = self.engine.max_over_ranks(torch.tensor(mine, dtype=torch.int64)).tolist()
        return begun, observed

    def _load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.events = [FreezeEvent(**event) for event in record["events"]]
        self.frozen = {name: event.step for event in self.events for name in event.frozen}
        for name in self.freezable:
            path, matrix = self._paths[name]
            (path.frozen.add if name in self.frozen else path.frozen.discard)(matrix)
        self._scores = self._new_scores(**record.get("window", {}))  # an earlier release knew of none
        self.engine.fill(tensors, list(self._score_numels()), self._score_pieces())

    def _fixed(self, trainable: Sequence[str]) -> list[str]:
        """Names of the parameters of the low-rank paths that do not train."""
        inside = {id(p) for path, _ in self._paths.values() for p in path.parameters()}
        trains = set(trainable)
        return [name for name, p in self.engine.parameters.items() if id(p) in inside and name not in trains]

    def _gather_scores(self) -> dict[str, Tensor]:
        return self.engine.collect(self._score_pieces(), self._score_numels())

    def _score_numels(self) -> dict[str, int]:
        """Sizes of the scores' averages by their names in a snapshot, as "smoothed/NAME"."""
        return {f"{kind}/{name}": self.numels[name] for kind in self._kinds for name in self.remaining}

    @property
    def _kinds(self) -> list[str]:
        """What scores average (`FreezingScore.averages`); the same where this rank holds none."""
        return list(FreezingScore([], "cpu", window=self.config.window).averages)

    def _score_pieces(self) -> list[Piece]:
        return [
            Piece(f"{kind}/{fragment.name}", fragment.start, average[at : at + fragment.numel])
            for score in self._scores
            for fragment, at in score.spans()
            for kind, average in score.averages.items()
        ]

    # -- each global batch -------------------------------------------------------------------

    def _observe(
        self,
        bucket: int,
        gradients: Sequence[Tensor],
        weights: Callable[[], Sequence[Tensor]],
        scale: Tensor | float,
    ) -> None:
        score = self._scores[bucket]
        with self._stopwatch.queueing(score.smoothed.device), torch.profiler.record_function("aflora.observe"):
            values = None if self.config.score == "gradient" else weights()
            score.observe(gradients, values, scale, self.step)

    def _after_batch(self) -> None:
        if self.policy.due(self.schedule, self.step, self._remaining_units()):
            self._decide()
        self._ending.note(self.step + 1, len(self.remaining))

    def _remaining_units(self) -> int:
        return sum(names[0] not in self.frozen for names in self.policy.units.values())

    def _decide(self) -> None:
        start = self._stopwatch.start(self.engine.device)  # the backward pass and the update are not freezing's
        with torch.profiler.record_function("aflora.decide"):
            scores = self.scores()
            names = self.policy.choose(self.schedule, self.step, scores, self._quantile)
            self._agree(f"{self.step}{names}", f"want to freeze different matrices after step {self.step}")
        if names:
            self._freeze(names, scores, start, self.step)
        else:
            self._stopwatch.stop(start, self.engine.device)

    def _quantile(self, fraction: float) -> float:
        """Of the elements' Ibar * Ubar, of all matrices that still train. A collective."""
        return quantile([s.smoothed * s.uncertainty for s in self._scores], fraction, self.engine.sum_over_ranks)

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze these matrices now, whatever the schedule says. A collective: call it on every rank.

        With pairwise freezing the other matrix of each pair freezes too.

        Raises:
            AFLoRAError: A name is not that of a freezable matrix that still trains.
        """
        unknown = sorted(set(names) - set(self.remaining))
        if unknown:
            raise AFLoRAError(f"{unknown[0]!r} is not a freezable matrix that still trains; see `remaining`.")
        chosen = set(names)
        whole = [name for unit in self.policy.units.values() if chosen & set(unit) for name in unit]
        self._agree(f"{self.step}{whole}", "were told to freeze different matrices")
        self._freeze(whole, {}, self._stopwatch.start(self.engine.device), max(self.step - 1, 0))

    def _freeze(self, names: list[str], scores: dict[str, float], start: float, step: int) -> None:
        """Freeze after the global batch `step`."""
        with torch.profiler.record_function("aflora.rebuild"):
            self._drop(names, step)
        state_bytes = self.optimizer_state_bytes()
        self.events.append(
            FreezeEvent(
                step=step,
                frozen=names,
                scores=scores,
                remaining=len(self.remaining),
                trainable_params=self.trainable_params,
                optimizer_state_bytes=state_bytes,
                rebuild_seconds=self._stopwatch.stop(start, self.engine.device),
            )
        )
        self._report(self.events[-1])

    def _report(self, event: FreezeEvent) -> None:
        """Call `on_freeze`; an error of one rank (a full disk, say) is everybody's, or the others would wait for it."""
        if self.on_freeze is None:
            return
        failure: Exception | None = None
        try:
            self.on_freeze(event)
        except Exception as error:
            failure = error
        failed = torch.tensor([self.engine.rank if failure else -1], dtype=torch.int64)
        rank = int(self.engine.max_over_ranks(failed).item())
        if failure is not None:
            raise failure
        if rank >= 0:
            raise AFLoRAError(
                f"on_freeze failed on rank {rank} after step {event.step}; what that rank printed tells why."
            )

    def _drop(self, names: list[str], step: int) -> None:
        """The engine lets go of the matrices, and the scores of the others follow their gradients."""
        for name in names:
            self.frozen[name] = step
            path, matrix = self._paths[name]
            path.frozen.add(matrix)
        old, window = self._scores, self._window()
        moves = self.engine.drop(names)
        self._scores = self._new_scores(*window)
        moves = [move for move in moves if move.fragment.name in self.numels]
        for kind in self._kinds:
            source = place((score.averages[kind], score.spans()) for score in old)
            target = place((score.averages[kind], score.spans()) for score in self._scores)
            self.engine.carry(moves, source, target)

    def _new_scores(self, begun: int = 0, observed: int = 0) -> list[FreezingScore]:
        buckets = self.engine.buckets(self.remaining)
        scores = [
            FreezingScore(
                fragments,
                device,
                kind=self.config.score,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                window=self.config.window,
            )
            for fragments, device in zip(buckets, self.engine.bucket_devices(), strict=True)
        ]
        for score in scores:
            score.begun, score.observed = begun, observed
        return scores

    def _agree(self, what: str, complaint: str) -> None:
        """Raise on every rank unless all ranks hold the same text. One all-reduce of two numbers."""
        digest = int(hashlib.sha256(what.encode()).hexdigest()[:16], 16) >> 2  # 62 bits: int64 holds its negative, too
        largest, negated = self.engine.max_over_ranks(torch.tensor([digest, -digest], dtype=torch.int64)).tolist()
        if largest != -negated:  # the smallest is not the largest
            raise AFLoRAError(f"The ranks {complaint}. Start all of them with the same code, seed and configuration.")


class _Ending:
    """Says at the end of a training, however it is reached, that it was shorter than the schedule was told.

    Knows nothing of the object that it speaks for, and so can outlive it.
    """

    def __init__(self, total: int, *, speaks: bool) -> None:
        self.total, self.speaks = total, speaks
        self.note(0, 0)

    def note(self, step: int, remaining: int) -> None:
        self.step, self.remaining = step, remaining
        self.errors = AFLoRAError.count

    def say(self) -> None:
        failed = getattr(sys, "last_type", None) is not None or sys.exc_info()[0] is not None
        failed = failed or AFLoRAError.count > self.errors  # one of ours, be it caught, after the last batch
        if not self.remaining or self.step >= self.total or failed or not self.speaks:
            return
        logger.warning(
            f"training ended after {self.step} of the {self.total} global batches that "
            f"FreezingConfig(total_steps={self.total}) was told, with {self.remaining} projection matrices unfrozen. "
            f"total_steps counts updates: epochs x examples / (ranks x batch size x accumulation)."
        )


class _Renamed(Mapping[str, Tensor]):
    """Tensors of a mapping by other names; none is read before it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        self._tensors, self._keys = tensors, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return (name for name, key in self._keys.items() if key in self._tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._keys and self._keys[name] in self._tensors  # type: ignore[index]


def thaw(model: nn.Module, names: Iterable[str]) -> None:
    """Let projection matrices that an earlier training froze train again, before an optimizer is created.

    Args:
        model: The unwrapped model.
        names: Of its parameters; who is no projection matrix of it is left out.
    """
    paths = _paths(model)
    for name in names:
        if name in paths:
            path, matrix = paths[name]
            path.frozen.discard(matrix)
            path.get_parameter(matrix).requires_grad_(True)


def _paths(model: nn.Module) -> dict[str, tuple[AFLoRAPath, str]]:
    return {
        f"{name}.{matrix}": (module, matrix)
        for name, module in named_modules(model).items()
        if isinstance(module, AFLoRAPath)
        for matrix in ("A", "B")
    }


__all__ = ["AdaptiveFreezing", "FreezeEvent", "FreezingConfig"]
