"""Adaptive freezing with transformers' Trainer and what is built on it (TRL): one callback."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import has_length

from .adapter.freezable import frozen_by_training, hold_frozen, thaw
from .adapter.saving import state_dict_of
from .compat.accelerate import unwrap
from .compat.contract import require_private
from .compat.transformers import TRAINER, saves_adapters
from .control import AdaptiveFreezing, FreezeEvent, FreezingConfig
from .control.freezable import Choice, checked_choice
from .control.scheduler import Scheduler
from .errors import AFLoRAError, DamagedError, writing
from .names import is_adapter, named_parameters, without_wrappers
from .notices import logger
from .options import FreezingEpochs, FreezingKeywords
from .processes import on_main
from .store import checkpoint
from .store.checkpoint import Checkpoint
from .watch.stopping import StopRequest

_STATE = "aflora"  # the folder in Trainer's checkpoint that holds the training's state by name
_LAST: WeakKeyDictionary[nn.Module, ref[AdaptiveFreezing]] = WeakKeyDictionary()  # who froze a model last
_MAKING: WeakSet[Trainer] = WeakSet()  # who make their optimizer themselves, and were given none


class FreezingCallback(TrainerCallback):
    """Attaches `AdaptiveFreezing` when training begins, and keeps its state in Trainer's checkpoints.

    `Trainer(..., callbacks=[FreezingCallback()])`, or `trainer.add_callback(FreezingCallback())` before training.
    From then on save_model and every checkpoint hold the whole adapter, on every engine; resume_from_checkpoint
    goes on from a checkpoint on any engine and number of ranks, and load_best_model_at_end goes back to a model of
    before a freeze. A further `train()` freezes what is left. With `enable_jit_checkpoint`, SIGTERM or
    SIGUSR1 to any rank (of one process Ctrl-C, too) makes all of them save after the same update, and train() return.

    Args:
        trainer: Not needed; Trainer introduces itself when training begins.
        initial_epochs: t_i in epochs; by default one, or a tenth of the training where that is less. Of data without
            a length (a stream with max_steps) all of the training is one epoch, as it is to Trainer.
        final_epochs: t_f in epochs; by default 70% of the training. With rule=threshold there is none.
        prefix_epochs: t_p in epochs, with `prefix`; by default half of t_f.
        freezable: What may freeze, as in `AdaptiveFreezing`.
        on_freeze: Called with each `FreezeEvent`.
        **options: Those of `FreezingOptions`.

    Raises:
        AFLoRAError: An option is out of range, when it is made; or the schedule does not fit, when training begins.

    Attributes:
        freezing: The `AdaptiveFreezing`, once training has begun.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        initial_epochs: float | None = None,
        final_epochs: float | None = None,
        prefix_epochs: float | None = None,
        freezable: Choice = None,
        on_freeze: Callable[[FreezeEvent], None] | None = None,
        **options: Unpack[FreezingKeywords],
    ) -> None:
        self.trainer = trainer
        self.freezable = checked_choice(freezable)
        self.on_freeze = on_freeze
        epochs = {"initial_epochs": initial_epochs, "final_epochs": final_epochs, "prefix_epochs": prefix_epochs}
        self.options = FreezingEpochs(**epochs, **options)
        self.freezing: AdaptiveFreezing | None = None
        self._resumed: Checkpoint | None = None
        self._stop: StopRequest | None = None

    # -- what Trainer tells its callbacks ------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_train_end(args, state, control)  # of a training that was interrupted
        trainer = self.trainer
        assert trainer is not None, "Trainer has introduced itself"
        if state.max_steps <= 0:  # num_train_epochs=0: nothing is trained
            return
        model = unwrap(trainer.accelerator, trainer.model)
        if (left := _LAST.get(model)) is not None and (of_before := left()) is not None:
            of_before.release()  # of a Trainer that was interrupted, which a notebook keeps with its traceback
        self.freezing = AdaptiveFreezing(
            trainer.accelerator,
            trainer.model_wrapped,
            trainer.optimizer,
            self._config(args, state, kwargs["train_dataloader"]),
            freezable=self.freezable,
            on_freeze=self.on_freeze,
        )
        _LAST[model] = ref(self.freezing)
        self.freezing.interrupted()  # if it ends early: Trainer counts, so that nobody has miscounted
        progress = self.freezing.progress
        progress.parts["scheduler"] = Scheduler(trainer.lr_scheduler, progress.engine)
        _warn_of_low_rates(self.freezing, args.learning_rate)
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            progress.restore(resumed.tensors, resumed.training["progress"])
        if args.enable_jit_checkpoint:
            self._stop = StopRequest(None, is_main=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """With `enable_jit_checkpoint` all ranks save and leave after the same update, when one was asked to.

        Raises:
            DivergedError: On every rank: what would be saved is not finite.
        """
        if self._stop is not None and self._stop.agreed():
            control.should_save = control.should_training_stop = True
        self.on_epoch_end(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer saves when all callbacks have been told, and may delete older checkpoints then."""
        if control.should_save and self.freezing is not None:
            self.freezing.progress.check_finite()

    def _save_rng_state(self, trainer: Trainer, original: Callable[..., Any], output_dir: str) -> None:
        """Add the state by name to a checkpoint that Trainer writes, before it deletes earlier ones. A collective.

        Raises:
            AFLoRAError: On every rank, if it cannot be written.
        """
        original(output_dir)
        freezing = self.freezing
        mine = self.trainer is trainer  # else this callback is another Trainer's, too
        if freezing is None or not mine or trainer.state.is_hyper_param_search:
            return
        tensors, record = freezing.progress.snapshot()
        folder = Path(output_dir) / _STATE

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier training in the same folder
            with writing("The freezing's state", folder):
                checkpoint.save(folder, freezing.step, tensors, {"progress": record}, keep=1)

        on_main(trainer.accelerator, write)
        freezing.progress.engine.settle()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freezing is not None:
            self.freezing.release()
        if self._stop is not None:
            self._stop.close()
            self._stop = None

    def _config(self, args: TrainingArguments, state: TrainerState, loader: Any) -> FreezingConfig:
        total = state.max_steps
        # As Trainer counts: the odd rest of an epoch's micro-batches is an update, too.
        per_epoch = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1) if has_length(loader) else total
        return FreezingConfig.of_epochs(self.options, per_epoch, total, args.seed)

    # -- what Trainer does before it tells, or in another way than is right here -------------------

    def _load_from_checkpoint(self, trainer: Trainer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """What was saved and does not train (rows for new tokens, buffers); what trains comes back by name, later.

        Where ranks hold shards of the model it has what its files and the seed made of it.
        """
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0
        if trainer.is_fsdp_enabled or stage == 3:
            return
        model, folder = trainer.model, Path(args[0] if args else kwargs["resume_from_checkpoint"])
        ours = (folder / _STATE).is_dir()
        if ours and saves_adapters(model) and not isinstance(model, PeftModel):
            return  # Trainer would look for the files of a whole model
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        active = list(model.active_adapters) if isinstance(model, PeftModel) else []
        try:
            original(*args, **kwargs)
        except ValueError as error:
            # Another engine has left no files of it, or a model in shards.
            known = ("Can't find a valid checkpoint", "only supported when using")
            if not ours or not any(said in str(error) for said in known):
                raise
        if len(active) > 1:  # Trainer has switched all but the first off
            model.base_model.set_adapter(active)
        for parameter, trains in trained:  # PEFT switches all of an adapter on
            parameter.requires_grad_(trains)

    def _prepare_for_training(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        max_steps: int,
        train_dataloader: Any,
        resume_from_checkpoint: str | None,
    ) -> Any:
        """Prepare without Trainer's own loading: optimizer files of after a freeze fit no optimizer of before it."""
        self.trainer, self._resumed = trainer, None
        theirs = trainer.pop_callback(JITCheckpointCallback)
        if theirs is not None:  # each rank would save when it was told, and without what callbacks add
            theirs.on_train_end(trainer.args, trainer.state, trainer.control)  # gives SIGTERM back
        if trainer.is_deepspeed_enabled and trainer.model_wrapped is not trainer.model:
            # A second train(): accelerate has let go of the DeepSpeedEngine, and Trainer would make no other.
            trainer.model_wrapped = trainer.model
            if trainer in _MAKING:
                trainer.optimizer = None
        model = unwrap(trainer.accelerator, trainer.model)
        if trainer in _MAKING:  # else the optimizer has to let go of them, once it is prepared
            hold_frozen(model, frozen_by_training(model))
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if not folder.is_dir():
                raise AFLoRAError(f"There is no folder {folder}, which resume_from_checkpoint names.")
            self._resumed = found = _find(trainer, folder)
            if found is None:
                raise AFLoRAError(
                    f"{folder} holds no state of freezing (the folder {_STATE}), so training cannot go on from it "
                    f"exactly: it was saved without FreezingCallback, with save_only_model, or its saving was cut "
                    f"short. Take another checkpoint, or start from the beginning (resume_from_checkpoint=None)."
                )
            progress = found.training["progress"]
            before = progress["parts"]["freezing"]["frozen_before"]  # that training was not the model's first
            if hold_frozen(model, before) and trainer in _MAKING:
                trainer.optimizer = None  # Trainer makes one without them
            since = (event["frozen"] for event in progress["parts"]["freezing"]["events"])
            self._thaw(trainer, model, {*progress["engine"]["names"]}.union(*since))
            if trainer.is_deepspeed_enabled:  # else Trainer has done so
                trainer._load_from_checkpoint(resume_from_checkpoint)
        return original(max_steps, train_dataloader, None)

    def _thaw(self, trainer: Trainer, model: nn.Module, names: Any) -> None:
        """Where this process has trained the model already: all that the checkpoint's training began with."""
        known = frozen_by_training(model)
        frozen = [n for n, p in named_parameters(model).items() if n in names and (n in known or not p.requires_grad)]
        if not frozen:
            return
        if trainer not in _MAKING:
            raise AFLoRAError(
                f"The optimizer given to Trainer has let go of {frozen[0]}, which trained at the checkpoint. Resume "
                f"with a new Trainer, a new model and a new optimizer."
            )
        thaw(model, frozen)
        trainer.optimizer = None  # it has let go of them: Trainer makes another one

    def _load_best_model(self, trainer: Trainer, original: Callable[..., Any]) -> None:
        """As Trainer, but whatever has frozen since: DeepSpeed's earlier files do not fit its optimizer any more."""
        best = _find(trainer, Path(trainer.state.best_model_checkpoint))
        if best is None or self.freezing is None:
            original()
        else:
            trainer._load_from_checkpoint(trainer.state.best_model_checkpoint)
            self.freezing.state.load_values(best.tensors)

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


def _warn_of_low_rates(freezing: AdaptiveFreezing, default: float) -> None:
    """Of a tenth of AFLoRA's lowest; `default`: of a schedule that begins at 0 and does not say where it goes."""
    for members, group in zip(freezing.engine.members, freezing.engine.optimizer.param_groups, strict=False):
        rate = float(group.get("initial_lr") or group["lr"] or default)
        if rate < 1e-4 and any(map(is_adapter, members)):
            return logger.warning(
                f"AFLoRA learns next to nothing at a learning rate of {rate:g}, and freezes all the same: its vectors "
                f"s_b start at 0. Set learning_rate: the paper's are 1e-3 to 1e-2 for encoders, its authors' 2e-3 for "
                f"LLaMA-7B; small language models want up to 3e-2."
            )


def _find(trainer: Trainer, folder: Path) -> Checkpoint | None:
    """The state in one of Trainer's checkpoints, if there is one; tensors are on the main process. A collective."""

    def choose() -> Checkpoint | None:
        chosen, complaints = checkpoint.newest_good(folder / _STATE)
        if chosen is None:
            if complaints:
                raise DamagedError(f"{complaints[0]} Take another checkpoint.")
            return None
        scheduler = chosen.training["progress"]["parts"]["scheduler"]
        if scheduler["state"] is None:
            file = folder / "scheduler.pt"
            scheduler["state"] = torch.load(file, weights_only=True) if file.exists() else None
        return chosen

    return checkpoint.read_on_main(trainer.accelerator, choose)


def _introduce() -> None:
    """Have Trainer call its FreezingCallback where it would tell no callback anything.

    A trainer without one is as it was. On the class, for a callback is not told what trainer it was given to.
    """
    require_private("transformers", Trainer, TRAINER)
    for name in ["_load_from_checkpoint", "_prepare_for_training", "_load_best_model", "_save_rng_state", "save_model"]:
        setattr(Trainer, name, _leading(getattr(Trainer, name), getattr(FreezingCallback, f"_{name.lstrip('_')}")))


def _leading(original: Callable[..., Any], extended: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.optimizer is None:
            _MAKING.add(trainer)
        found = [c for c in trainer.callback_handler.callbacks if isinstance(c, FreezingCallback)]
        if len(found) > 1:
            raise AFLoRAError(f"The trainer has {len(found)} FreezingCallbacks; add one.")
        if not found:
            return original(trainer, *args, **kwargs)
        return extended(found[0], trainer, functools.partial(original, trainer), *args, **kwargs)

    return call


_introduce()
