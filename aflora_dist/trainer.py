"""Adaptive freezing with transformers' Trainer and what is built on it (TRL): one callback."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .adapter.saving import state_dict_of
from .compat.accelerate import unwrap
from .contract import Private, require
from .control import AdaptiveFreezing, FreezeEvent, FreezingConfig, thaw
from .engines import Engine
from .engines.optimizers import plain
from .errors import AFLoRAError, DamagedError, writing
from .freezing import ScoreKind, whole_steps
from .names import named_parameters, without_wrappers
from .processes import on_main
from .store import checkpoint
from .store.checkpoint import Checkpoint

_STATE = "aflora"  # the folder in Trainer's checkpoint that holds the training's state by name

TRAINER = [
    Private("Trainer", name, why, "callbacks that are called before a checkpoint is loaded")
    for name, why in (
        ("_load_from_checkpoint", "resume after a freeze, and on another engine"),
        ("_prepare_for_training", "resume after a freeze, and on another engine"),
        ("_load_best_model", "go back to a model of before a freeze"),
        ("_save", "save the adapter alone where ranks hold shards"),
    )
]
PRIVATE = {"transformers": TRAINER}


class FreezingCallback(TrainerCallback):
    """Attaches `AdaptiveFreezing` when training begins, and keeps its state in Trainer's checkpoints.

    `Trainer(..., callbacks=[FreezingCallback()])`, or `trainer.add_callback(FreezingCallback())` before training.
    From then on save_model and every checkpoint hold the whole adapter, on every engine; resume_from_checkpoint
    goes on from a checkpoint on any engine and number of ranks, and load_best_model_at_end goes back to a model of
    before a freeze. A further `train()` freezes what is left.

    Args:
        trainer: Not needed; Trainer introduces itself when training begins.
        initial_epochs: t_i in epochs; by default one, or a tenth of the training where that is less. Of data without
            a length (a stream with max_steps) all of the training is one epoch, as it is to Trainer.
        final_epochs: t_f in epochs; by default 70% of the training.
        on_freeze: Called with each `FreezeEvent`.
        beta1, beta2, score, pairwise, every: As in `FreezingConfig`.

    Attributes:
        freezing: The `AdaptiveFreezing`, once training has begun.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        initial_epochs: float | None = None,
        final_epochs: float | None = None,
        on_freeze: Callable[[FreezeEvent], None] | None = None,
        beta1: float = 0.85,
        beta2: float = 0.95,
        score: ScoreKind = "gradient",
        pairwise: bool = False,
        every: int = 1,
    ) -> None:
        self.trainer = trainer
        self.initial_epochs = initial_epochs
        self.final_epochs = final_epochs
        self.on_freeze = on_freeze
        self.options: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "score": score, "pairwise": pairwise}
        self.options["every"] = every
        self.freezing: AdaptiveFreezing | None = None
        self._resumed: Checkpoint | None = None
        self._given_optimizer = False  # by the user, and not made by Trainer

    # -- what Trainer tells its callbacks ------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freezing is not None:
            self.freezing.release()  # of a training that was interrupted
        trainer = self.trainer
        assert trainer is not None, "Trainer has introduced itself"
        self.freezing = AdaptiveFreezing(
            trainer.accelerator,
            trainer.model_wrapped,
            trainer.optimizer,
            self._config(args, state, kwargs["train_dataloader"]),
            on_freeze=self.on_freeze,
        )
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            self.freezing.progress.restore(resumed.tensors, resumed.training["progress"])
            _set_scheduler(trainer.lr_scheduler, resumed.training["scheduler"], self.freezing.engine)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Trainer saves when all callbacks have been told, and may delete older checkpoints then.

        Raises:
            DivergedError: On every rank: what would be saved is not finite.
        """
        if control.should_save and self.freezing is not None:
            self.freezing.progress.check_finite()

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state by name to the checkpoint that Trainer has written. A collective.

        Raises:
            AFLoRAError: On every rank, if it cannot be written.
        """
        trainer, freezing = self.trainer, self.freezing
        if trainer is None or freezing is None or args.save_only_model or state.is_hyper_param_search:
            return
        tensors, record = freezing.progress.snapshot()
        training = {"progress": record, "scheduler": _scheduler(trainer.lr_scheduler, freezing.engine)}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _STATE

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier training in the same folder
            with writing("The freezing's state", folder):
                checkpoint.save(folder, freezing.step, tensors, training, keep=1)

        on_main(trainer.accelerator, write)
        freezing.progress.engine.settle()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freezing is not None:
            self.freezing.release()

    def _config(self, args: TrainingArguments, state: TrainerState, loader: Any) -> FreezingConfig:
        total = state.max_steps
        if args.max_steps <= 0:  # Trainer has counted epochs, perhaps a fraction of one
            per_epoch = total / args.num_train_epochs
        else:
            per_epoch = len(loader) / args.gradient_accumulation_steps if has_length(loader) else total
        initial = per_epoch * self.initial_epochs if self.initial_epochs is not None else min(per_epoch, 0.1 * total)
        final = per_epoch * self.final_epochs if self.final_epochs is not None else 0.7 * total
        t_i, t_f = whole_steps(initial, final, total)
        return FreezingConfig(total_steps=total, initial_steps=t_i, final_steps=t_f, **self.options)

    # -- what Trainer does before it tells, or in another way than is right here -------------------

    def _load_from_checkpoint(self, trainer: Trainer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """All that trained comes back by name when training begins; the rest is the base model's."""

    def _prepare_for_training(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        max_steps: int,
        train_dataloader: Any,
        resume_from_checkpoint: str | None,
    ) -> Any:
        """Prepare without Trainer's own loading: optimizer files of after a freeze fit no optimizer of before it."""
        if self.freezing is None or self.trainer is not trainer:
            self._given_optimizer = trainer.optimizer is not None
        self.trainer = trainer
        self._resumed = None
        if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
            # A second train(): accelerate has let go of the DeepSpeedEngine, and Trainer would make no other.
            trainer.model_wrapped = trainer.model
            if not self._given_optimizer:
                trainer.optimizer = None
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self._resumed = found = _find(trainer, folder)
            if found is None:
                raise AFLoRAError(
                    f"{folder} holds no state of freezing (the folder {_STATE}), so training cannot go on from it "
                    f"exactly: it was saved without FreezingCallback, with save_only_model, or its saving was cut "
                    f"short. Take another checkpoint, or start from the beginning (resume_from_checkpoint=None)."
                )
            self._thaw(trainer, found.training["progress"]["parts"]["freezing"]["numels"])
        return original(max_steps, train_dataloader, None)

    def _thaw(self, trainer: Trainer, names: Any) -> None:
        """Where this process has trained the model already: all that the checkpoint's training began with."""
        model = unwrap(trainer.accelerator, trainer.model)
        frozen = [name for name, p in named_parameters(model).items() if name in names and not p.requires_grad]
        if not frozen:
            return
        if self._given_optimizer:
            raise AFLoRAError(
                f"The optimizer given to Trainer has let go of {frozen[0]}, which trained at the checkpoint. Resume "
                f"with a new Trainer, a new model and a new optimizer."
            )
        thaw(model, frozen)
        trainer.optimizer = None  # it has let go of them: Trainer makes another one

    def _load_best_model(self, trainer: Trainer, original: Callable[..., Any]) -> None:
        """As Trainer, but whatever has frozen since: DeepSpeed's files of then do not fit its optimizer of now."""
        best = _find(trainer, Path(trainer.state.best_model_checkpoint))
        if best is None or self.freezing is None:
            original()
        else:
            self.freezing.load_values(best.tensors)

    def _save_model(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        output_dir: str | None = None,
        _internal_call: bool = False,
    ) -> None:
        """As Trainer; but where ranks hold shards it would gather the base model, too, or refuse, or write nothing."""
        if self.freezing is None or not self.freezing.engine.sharded:
            original(output_dir, _internal_call)
            return
        engine = self.freezing.engine
        state = state_dict_of(engine.model, self.freezing.adapter_values())
        if trainer.args.should_save:  # transformers 5.3 writes on whichever rank calls this
            with without_wrappers(engine.model):
                trainer._save(output_dir, state_dict=state)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


def _find(trainer: Trainer, folder: Path) -> Checkpoint | None:
    """The state in one of Trainer's checkpoints, if there is one; tensors are there on the main process. A collective.

    Raises:
        AFLoRAError: On every rank: it is damaged, or of another format.
    """
    chosen: Checkpoint | None = None

    def read() -> tuple[Path, dict[str, Any]] | None:
        nonlocal chosen
        chosen, complaints = checkpoint.newest_good(folder / _STATE)
        if chosen is None:
            if complaints:
                raise DamagedError(f"{complaints[0]} Take another checkpoint.")
            return None
        training = chosen.training
        if training["scheduler"]["state"] is None:
            file = folder / "scheduler.pt"
            training["scheduler"]["state"] = torch.load(file, weights_only=True) if file.exists() else None
        return chosen.path, training

    found = on_main(trainer.accelerator, read)
    return chosen if chosen is not None or found is None else Checkpoint(found[0], {}, found[1])


def _scheduler(scheduler: Any, engine: Engine) -> dict[str, Any]:
    """Which scheduler this is; its state where Trainer does not save it as scheduler.pt (DeepSpeed's own).

    And the numbers among the param groups' options (rates, betas), which schedulers set: at the next update they count.
    """
    owned = isinstance(scheduler, AcceleratedScheduler)
    return {
        "name": type(_inner(scheduler)).__name__,
        "state": dict(scheduler.state_dict()) if owned else None,
        "groups": engine.members,
        "options": [_numbers(group) for group in engine.optimizer.param_groups],
    }


def _inner(scheduler: Any) -> Any:
    return scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    found = {
        key: plain(value) for key, value in group.items() if not isinstance(value, torch.Tensor) or value.dim() == 0
    }
    return {
        key: value
        for key, value in found.items()
        if is_number(value) or (isinstance(value, tuple | list) and value and all(map(is_number, value)))
    }


def _set_scheduler(scheduler: Any, stored: dict[str, Any], engine: Engine) -> None:
    """Go on with the learning rates where they were.

    Raises:
        AFLoRAError: It is another kind of scheduler.
    """
    inner, groups = _inner(scheduler), engine.optimizer.param_groups
    name = type(inner).__name__
    if stored["name"] != name or stored["state"] is None:
        there = stored["name"] if stored["state"] is not None else "no state of one (scheduler.pt is missing)"
        raise AFLoRAError(
            f"The checkpoint is of another learning-rate scheduler: {there} there and {name} here. "
            f"Resume with the scheduler that the training began with."
        )
    state = stored["state"]
    if stored["groups"] != engine.members:
        state |= _regrouped(state, scheduler.state_dict(), stored["groups"], engine.members)
    scheduler.load_state_dict(state)
    if "options" in stored:
        place = {name: position for position, names in enumerate(stored["groups"]) for name in names}
        for group, names in zip(groups, engine.members, strict=False):
            at = next((place[name] for name in names if name in place), None)
            for key, value in ({} if at is None else stored["options"][at]).items():
                _set(group, key, value)
    else:  # a checkpoint of an earlier release; DeepSpeed's schedulers compute their rate anew
        rates = inner.get_last_lr() if isinstance(inner, LRScheduler) else inner.get_lr()
        for group, rate in zip(groups, rates, strict=True):
            _set(group, "lr", rate)


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    elif key in group:
        group[key] = tuple(value) if isinstance(value, list) else value


def _regrouped(
    theirs: dict[str, Any], mine: dict[str, Any], there: list[list[str]], here: list[list[str]]
) -> dict[str, Any]:
    """Lists by param group, for these param groups: DeepSpeed leaves out those that are empty from the beginning."""
    place = {name: position for position, names in enumerate(there) for name in names}
    source = [next((place[name] for name in names if name in place), None) for names in here]
    return {
        key: [own if at is None else value[at] for own, at in zip(mine[key], source, strict=True)]
        for key, value in theirs.items()
        if isinstance(value, list) and len(value) == len(there) and len(mine.get(key, ())) == len(here)
    }


def _introduce() -> None:
    """Have Trainer call its FreezingCallback where it would tell no callback anything.

    A trainer without one is as it was. On the class, for a callback is not told what trainer it was given to.

    Raises:
        UnsupportedEngineError: This release of transformers has no such places.
    """
    require("transformers", Trainer, TRAINER)
    for name in ("_load_from_checkpoint", "_prepare_for_training", "_load_best_model", "save_model"):
        setattr(Trainer, name, _leading(getattr(Trainer, name), getattr(FreezingCallback, f"_{name.lstrip('_')}")))


def _leading(original: Callable[..., Any], extended: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        found = [c for c in trainer.callback_handler.callbacks if isinstance(c, FreezingCallback)]
        if len(found) > 1:
            raise AFLoRAError(f"The trainer has {len(found)} FreezingCallbacks; add one.")
        if not found:
            return original(trainer, *args, **kwargs)
        return extended(found[0], trainer, functools.partial(original, trainer), *args, **kwargs)

    return call


_introduce()
