"""Everything of a training that is set up, and can be refused, before its first update."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..adapter.precision import check_precision
from ..compat.transformers import checkpoint_activations
from ..control import Progress
from ..engines import create_engine, engine_kind
from ..errors import AFLoRAError, one_line
from ..extras import require
from ..freezing import Moments
from ..methods import Control, Method
from ..methods.choose import lora_parameters
from ..names import adapter_tensor
from ..options import Config
from ..processes import launched_accelerator, launched_processes, on_main
from ..processes.meeting import meet
from ..store import fingerprint
from ..store.best import BestEpoch, check_metric
from ..store.parts import Held
from ..store.resume import LABELS, Checkpointer, find
from ..store.rundir import RunDirectory
from ..tasks.base import Task
from ..tasks.classification import Classification
from ..tasks.model import fetch, resolve_name
from ..tasks.sft import LanguageModelling
from ..watch.log import TrainingLog
from ..watch.memory import MemoryHistory
from ..watch.rates import flops_per_token
from ..watch.traces import TraceRecorder, Window, windows
from . import compile_lock, deepspeed_file

_UP = re.compile(r"\.(aflora\.[^.]+\.B|lora_B\..*|lora_embedding_B\..*)$")  # AFLoRA's B, and LoRA's


class Training:
    """A training that is about to begin. Setting it up is a collective.

    Attributes:
        model, optimizer: Prepared by the accelerator.
        sampler, batches: Deal this rank its micro-batches.
        best: Keeps the best epoch, if that is asked for.
        resumed: The checkpoint to go on from, if there is one.
        first_step: Updates that have been done before.

    Raises:
        AFLoRAError: What was asked for cannot be done; on every rank, and before anything of an earlier run is gone.
    """

    def __init__(
        self, config: Config, resolved: str, method: Method, accelerator: Accelerator, run: RunDirectory
    ) -> None:
        self.config, self.method, self.accelerator, self.run = config, method, accelerator, run
        self.resumed = find(run, resolved, accelerator)
        set_seed(config.train.seed)
        self.task = task = create_task(config)
        fetch(config.model, language_model=config.data.task == "sft")
        base, head = task.load(accelerator)
        meet()  # who could not load it has said so
        task.limits.check_length(config.data.max_length)
        if config.train.gradient_checkpointing:
            checkpoint_activations(base)
        model = method.adapt(base, head)
        check_precision(model, accelerator)
        held = hold(model, head, config.model.train_new, method)
        self.sampler, self.batches = task.batches(accelerator)
        check_metric(config.run.keep_best, task.metrics())
        self.total_steps = config.train.updates(self.sampler.updates_per_epoch)
        method.check(self.sampler.updates_per_epoch)  # may refuse: before time is spent
        method.check_engine(engine_kind(accelerator), str(accelerator.mixed_precision))
        create_schedule(config, torch.optim.SGD([torch.zeros(())]), self.total_steps)  # likewise
        optimizer = create_optimizer(config, model, method)
        of_head = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and method.is_head(n))
        sizes = (of_head, lora_parameters(model), flops_per_token(model, method.is_head))
        accumulate(config, accelerator, self.sampler.micro_batches)
        shard_by_block(accelerator, model)
        with deepspeed_file.told_of_refusals():
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.progress = progress = Progress(create_engine(accelerator, self.model, self.optimizer))
        self._trained = frozenset(progress.engine.trainable)  # before anything froze
        self.control = method.attach(
            accelerator,
            self.model,
            self.optimizer,
            progress,
            lambda event: run.append("freeze_log.jsonl", asdict(event)),
        )
        if held:
            progress.parts["model.train_new"] = Held(progress.engine, held)
        self.best: BestEpoch | None = None
        if config.run.keep_best is not None:
            self.best = BestEpoch(config.run.keep_best, config.run.patience, self.adapter)
            progress.parts["run.keep_best"] = self.best
        task.rehearse(self.model, accelerator)
        self._windows = create_windows(config, self.control, self.total_steps)
        snapshots = config.profile.memory and any(window.freezes for window in self._windows)
        self._history = MemoryHistory() if snapshots and accelerator.device.type == "cuda" else None
        self.scheduler = create_schedule(config, progress.engine.optimizer, self.total_steps)
        data = on_main(accelerator, lambda: trained_on(config, task))
        self.log = TrainingLog(
            config, run, accelerator, progress, self.control, self.total_steps, self.sampler.updates_per_epoch, *sizes
        )
        self.checkpointer = Checkpointer(run, accelerator, progress, self.scheduler, data, resolved)
        self.first_step = self.checkpointer.claim(self.resumed)  # all that can be refused has been

    def adapter(self) -> dict[str, Tensor]:
        """What adapter/ would hold now, by name, on the main process. A collective.

        Raises:
            DivergedError: On every rank: it is not finite.
        """
        self.progress.check_finite()
        engine = self.progress.engine
        return engine.gather([name for name in engine.parameters if self.method.saved(name, name in self._trained)])

    def traces(self) -> TraceRecorder:
        return TraceRecorder(
            self._windows,
            self.first_step,
            self.run.tensorboard,
            self.accelerator,
            self.model,
            self.optimizer,
            self.config.profile.ranks,
            self.config.profile.memory,
            self._history,
        )


def create_task(config: Config) -> Task:
    return LanguageModelling(config) if config.data.task == "sft" else Classification(config)


def trained_on(config: Config, task: Task) -> dict[str, str | None]:
    """What must not have changed where a run goes on, by what a person calls it."""
    trained, measured = task.tokens()
    name = resolve_name(config.model.name, config.data.task == "sft")
    return {
        LABELS: None if task.labels is None else json.dumps(task.labels, ensure_ascii=False),
        "training data": fingerprint.of_examples(trained),
        "validation data": fingerprint.of_examples(measured),  # a result would hold numbers of both
        "base weights": fingerprint.of_weights(name, config.model.revision),
        "settings of the base model (config.json)": fingerprint.of_settings(name, config.model.revision),
    }


def create_accelerator(config: Config) -> Accelerator:
    """The accelerator that the launcher asks for; DeepSpeed's batch and clipping settings are ours."""
    processes = launched_processes()
    check_launch(config, processes)
    deepspeed_file.check_file(config, processes)
    compile_lock.check_locks(deepspeed_file.compiled_ops())
    accelerator = launched_accelerator(step_scheduler_with_optimizer=False)
    accumulate(config, accelerator, config.train.accumulation)  # zero.Init wants to know before the data is known
    return accelerator


def check_launch(config: Config, processes: int) -> None:
    """Raise if a configuration is not one for so many processes."""
    train, needed = config.train, processes * config.train.accumulation
    if train.batch_size < needed:
        raise AFLoRAError(
            f"train.batch_size={train.batch_size} cannot be split: {processes} processes x "
            f"train.accumulation={train.accumulation} = {needed} micro-batches, each with an example at least."
        )
    unknown = [rank for rank in config.profile.ranks or [] if rank >= processes]
    if unknown and config.profile.enabled:
        raise AFLoRAError(f"profile.ranks names rank {unknown[0]}; there are {processes}, from 0 on.")
    if train.seed + processes > 2**32:  # a rank's seed is train.seed and its number
        raise AFLoRAError(
            f"train.seed={train.seed} is too large for {processes} processes, whose last one's would be "
            f"{train.seed + processes - 1}: NumPy's are below 2^32."
        )


def accumulate(config: Config, accelerator: Accelerator, micro_batches: int) -> None:
    """Have the accelerator, and DeepSpeed, take so many micro-batches for an update."""
    accelerator.gradient_accumulation_steps = micro_batches  # whatever the environment says
    if (plugin := accelerator.state.deepspeed_plugin) is None:
        return
    deepspeed_file.contradicted(config, accelerator.num_processes, micro_batches)
    plugin.deepspeed_config.update(deepspeed_file.values(config, accelerator.num_processes, micro_batches))
    plugin.deepspeed_config.pop("train_batch_size", None)


def shard_by_block(accelerator: Accelerator, model: Any) -> None:
    """Have FSDP2 shard by transformer blocks alone, unless the launcher names classes.

    transformers lists BERT's embeddings among them, whose matrix accelerate then shards a second time, and fails.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    embedding = model.get_input_embeddings()
    holding = {type(m).__name__ for m in model.modules() if any(inner is embedding for inner in m.modules())}
    there = {type(m).__name__ for m in model.modules()} - holding
    if blocks := [name for name in getattr(model, "_no_split_modules", None) or () if name in there]:
        plugin.transformer_cls_names_to_wrap = blocks


def hold(model: nn.Module, new: Sequence[str], train_new: Sequence[str] | None, method: Method) -> list[str]:
    """Have those of the new modules that are not to train keep their random start; returns their parameters' names.

    Raises an AFLoRAError if `train_new` names what is not new.
    """
    if train_new is None:
        return []
    if unknown := sorted(set(train_new) - set(new)):
        raise AFLoRAError(
            f"model.train_new names {unknown[0]!r}, which is no new module of this model. New are: "
            f"{', '.join(new) or 'none, all come from the checkpoint'}."
        )
    still = [f".{module}." for module in new if module not in train_new]
    held = [n for n, p in model.named_parameters() if method.is_head(n) and any(s in f".{n}" for s in still)]
    for name in held:
        model.get_parameter(name).requires_grad_(False)
    return held


def create_optimizer(config: Config, model: nn.Module, method: Method) -> torch.optim.Optimizer:
    """The optimizer over param groups: the adapter, and what of it has a rate of its own, and the head; biases last.

    Raises:
        AFLoRAError: It does not take one of its options.
    """
    train = config.train
    rates = [train.learning_rate, train.learning_rate * train.loraplus_lr_ratio, train.vector_learning_rate]
    rates.append(train.head_learning_rate)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared, tensor, which = name.endswith("bias") and not train.decay_biases, adapter_tensor(name), 0
            if method.is_head(name):
                which = 3
            elif train.loraplus_lr_ratio != 1 and _UP.search(name) is not None:
                which = 1
            elif train.vector_learning_rate is not None and tensor is not None and not tensor.is_matrix:
                which = 2
            groups.setdefault((which, spared), []).append(parameter)
    if train.loraplus_lr_ratio != 1 and not any(which == 1 for which, _ in groups):
        raise AFLoRAError(f"train.loraplus_lr_ratio is for methods with matrices A and B; {method.name} has none.")
    made = [
        {"params": groups[which, spared], "lr": rates[which], "weight_decay": 0.0 if spared else train.weight_decay}
        for which, spared in sorted(groups)
    ]
    if odd := sorted({"lr", "weight_decay", "params"} & {*train.optimizer_options}):
        raise AFLoRAError(f"train.optimizer_options names {odd[0]}: rates and weight decay are options of train.*.")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in train.optimizer_options.items()}
    try:
        optimizer: torch.optim.Optimizer = _optimizer_class(train.optimizer)(made, **options)
    except (TypeError, ValueError) as error:
        raise AFLoRAError(
            f"train.optimizer={train.optimizer} does not take {options} (train.optimizer_options): {one_line(error)}."
        ) from None
    return optimizer


def _optimizer_class(name: str) -> Any:
    package, _, kind = name.rpartition(".")
    if not package:
        return getattr(torch.optim, kind)
    require("quantized", f"train.optimizer={name}", package)
    return getattr(importlib.import_module(f"{package}.optim"), kind)


def create_schedule(config: Config, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """The learning rates' rise, and how they go on, over t: a skipped update moves it, too.

    Raises:
        AFLoRAError: It does not take one of its options, or the rise is longer than the training.
    """
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the first one was skipped
    name: str = config.train.schedule
    options = dict(config.train.schedule_options)
    rise = warm_up(config, total_steps)
    if rise > total_steps:
        raise AFLoRAError(f"train.warmup_steps={rise} is more than the {total_steps} updates of this training.")
    if "min_lr" in options or "lr_end" in options:
        raise AFLoRAError("train.schedule_options: each group has a rate of its own; say min_lr_rate, a share of it.")
    if name == "constant":
        name = "constant_with_warmup"
        if options:
            raise AFLoRAError("train.schedule_options: train.schedule=constant has none.")
    if name == "warmup_stable_decay":
        options.setdefault("num_decay_steps", max(1, round(0.1 * total_steps)))
    try:
        schedule: LambdaLR = get_scheduler(name, optimizer, rise, total_steps, options)
        for share in schedule.lr_lambdas:  # some options are looked at late
            share(total_steps - 1)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise AFLoRAError(
            f"train.schedule={name} does not take {options} (train.schedule_options): {one_line(error)}."
        ) from None
    return schedule


def warm_up(config: Config, total_steps: int) -> int:
    """Updates in which the learning rate rises."""
    said = config.train.warmup_steps
    return round(config.train.warmup_ratio * total_steps) if said is None else said


def create_windows(config: Config, control: Control, total_steps: int) -> tuple[Window, ...]:
    """What of the training the profiler records; may refuse."""
    profile = config.profile
    if not profile.enabled:
        return ()
    return windows(control.moments or Moments(total_steps), profile.steps, profile.starts)
