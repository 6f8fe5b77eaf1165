"""The main job: fine-tune, freeze, evaluate, write the run's directory. One function reads as the story."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from ..engines import create_engine
from ..errors import AFLoRAError, writing
from ..freezing import CubicSchedule
from ..methods import Control, Method
from ..methods.choose import create_method, lora_parameters
from ..processes import launched_accelerator, on_main
from ..progress import Progress
from ..store.best import BestEpoch, check_metric
from ..store.resume import Checkpointer, find, finished
from ..store.rundir import RunDirectory
from ..tasks.base import Task
from ..tasks.batches import Batch, move
from ..tasks.classification import Classification
from ..tasks.sft import LanguageModelling
from ..watch.log import TrainingLog
from ..watch.stopping import StopWish
from ..watch.traces import TraceRecorder, Window, windows
from .config import Config


def train(config: Config, resolved: str, method: Method | None = None) -> dict[str, Any] | None:
    """Run the main job on this rank.

    Args:
        resolved: `config` as YAML, to keep beside the results.
        method: What trains; as the configuration says if not given.

    Returns:
        What result.json holds, the same on every rank; None if the job was asked to stop early, and
        has saved a checkpoint.

    Raises:
        AFLoRAError: What was asked for cannot be done; on every rank.
        DivergedError: The loss or a freezing score is no longer finite.
    """
    method = method or create_method(config)
    accelerator = create_accelerator(config)
    run = RunDirectory(config.run, accelerator)
    if (result := finished(run, resolved)) is not None:
        return result
    resumed = find(run, resolved, accelerator)
    set_seed(config.train.seed)
    task = create_task(config)
    base, head = task.load(accelerator)
    check_length(config, base)
    if config.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = method.adapt(base, head)
    sampler, batches = task.batches(accelerator)
    check_metric(config.run.keep_best, task.metrics())
    per_epoch = sampler.updates_per_epoch
    total_steps = config.train.epochs * per_epoch
    method.check(per_epoch)  # may refuse: before time is spent
    optimizer = create_optimizer(config, model, method)
    head_params = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and method.is_head(n))
    lora_r8 = lora_parameters(model)
    accumulate(config, accelerator, sampler.micro_batches)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress(create_engine(accelerator, model, optimizer))
    control = method.attach(
        accelerator, model, optimizer, progress, lambda event: run.append("freeze_log.jsonl", asdict(event))
    )
    best = keep_best(config, method, progress)
    task.rehearse(model, accelerator)
    recorded = create_windows(config, control, total_steps, accelerator)
    scheduler = create_scheduler(config, progress, total_steps)
    checkpointer = Checkpointer(run, accelerator, progress, scheduler, task.digest(), resolved)
    first_step = checkpointer.claim(resumed)  # all that can be refused has been
    set_seed(config.train.seed, device_specific=True)  # from here on every rank draws its own dropout
    profile = config.profile
    with (
        closing(
            TrainingLog(config, run, accelerator, progress, control, total_steps, head_params, lora_r8, first_step)
        ) as log,
        closing(
            TraceRecorder(
                recorded, first_step, run.tensorboard, accelerator, model, optimizer, profile.ranks, profile.memory
            )
        ) as traces,
        closing(StopWish(run.stop_file, run.writes)) as wish,
    ):
        evaluations = checkpointer.restore(resumed, log) if resumed else []
        log.describe(resolved)
        for epoch in range(len(evaluations), config.train.epochs):
            model.train()
            sampler.epoch, sampler.start = epoch, progress.step - epoch * per_epoch
            drawn = iter(batches)
            checkpointer.restore_randomness()
            with log.timed():
                for micro_batches in updates(drawn, sampler.micro_batches):
                    step, trained = progress.step, progress.engine.trainable_params
                    scale = sampler.scale(step - epoch * per_epoch)
                    loss, norm = update(
                        task, model, optimizer, micro_batches, accelerator, scale, config.train.max_grad_norm
                    )
                    assert progress.step == step + 1, "one global batch, one tick of the clock"
                    log.update(loss, norm, trained, [float(rate) for rate in scheduler.get_last_lr()])
                    scheduler.step()
                    traces.advance(step)
                    stop = wish.agreed(run.failure)
                    if stop or save_is_due(config, progress.step, per_epoch):
                        checkpointer.save(log, evaluations)
                    if stop:
                        log.stopped()
                        control.interrupted()
                        accelerator.wait_for_everyone()
                        accelerator.end_training()
                        return None
                wish.settle(run.failure)
            evaluation = task.evaluate(model, accelerator)
            evaluations.append(evaluation.metrics)
            log.evaluated(evaluation)
            if best is not None:
                best.evaluated(epoch + 1, evaluation.metrics)
                if best.exhausted and epoch + 1 < config.train.epochs:
                    log.ended_early(best)
                    break
        save_adapter(method, progress, run, accelerator, best)
        result = log.finished(
            evaluations, task, method.name, [str(path.relative_to(run.path)) for path in traces.written], best
        )
    run.finish(result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def create_task(config: Config) -> Task:
    return LanguageModelling(config) if config.data.task == "sft" else Classification(config)


def save_is_due(config: Config, step: int, per_epoch: int) -> bool:
    every = config.run.save_every
    return step % per_epoch == 0 if every is None else every > 0 and step % every == 0


def create_accelerator(config: Config) -> Accelerator:
    """The accelerator that the launcher asks for; DeepSpeed's batch and clipping settings are ours."""
    accelerator = launched_accelerator(step_scheduler_with_optimizer=False)
    needed = accelerator.num_processes * config.train.accumulation
    if config.train.batch_size < needed:
        raise AFLoRAError(
            f"train.batch_size={config.train.batch_size} cannot be split: {accelerator.num_processes} processes x "
            f"train.accumulation={config.train.accumulation} = {needed} micro-batches, each with an example at least."
        )
    accumulate(config, accelerator, config.train.accumulation)  # zero.Init wants to know before the data is known
    return accelerator


def accumulate(config: Config, accelerator: Accelerator, micro_batches: int) -> None:
    """Have the accelerator, and DeepSpeed, take so many micro-batches for an update."""
    accelerator.gradient_accumulation_steps = micro_batches  # whatever the environment says
    if (plugin := accelerator.state.deepspeed_plugin) is None:
        return
    ours = {
        # Micro-batches differ in size; DeepSpeed only reports this number.
        "train_micro_batch_size_per_gpu": max(
            config.train.batch_size // (accelerator.num_processes * micro_batches), 1
        ),
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.train.max_grad_norm,
    }
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):  # else the values are the launcher's defaults
        said = json.loads(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text(encoding="utf-8"))
        for key, value in ours.items():
            if said.get(key, "auto") not in ("auto", value):
                raise AFLoRAError(
                    f"DeepSpeed's file says {key}={said[key]}, but train.* and data.* come to {value}. "
                    f'Write "auto" there.'
                )
    plugin.deepspeed_config.update(ours)
    plugin.deepspeed_config.pop("train_batch_size", None)


def check_length(config: Config, model: Any) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        raise AFLoRAError(
            f"data.max_length={config.data.max_length} is more than the {longest} positions of {config.model.name!r}."
        )


def create_optimizer(config: Config, model: nn.Module, method: Method) -> torch.optim.Optimizer:
    """AdamW over two param groups: the adapter, and the head (if it trains) with its own learning rate."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trainable.items() if not method.is_head(n)], "lr": config.train.learning_rate},
        {"params": [p for n, p in trainable.items() if method.is_head(n)], "lr": config.train.head_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=config.train.weight_decay)


def create_scheduler(config: Config, progress: Progress, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up and decay over t: a skipped update moves it, too."""
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the first one was skipped
    warm_up = round(config.train.warmup_ratio * total_steps)
    return get_linear_schedule_with_warmup(progress.engine.optimizer, warm_up, total_steps)


def create_windows(config: Config, control: Control, total_steps: int, accelerator: Accelerator) -> tuple[Window, ...]:
    profile = config.profile
    if not profile.enabled:
        return ()
    unknown = [rank for rank in profile.ranks or [] if not 0 <= rank < accelerator.num_processes]
    if unknown:
        raise AFLoRAError(f"profile.ranks names rank {unknown[0]}; there are {accelerator.num_processes}, from 0 on.")
    never = CubicSchedule(total_steps=total_steps, initial_steps=0, final_steps=0)
    return windows(control.schedule or never, len(control.freezable), profile.steps, profile.starts)


def updates(batches: Iterable[Batch], accumulation: int) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other."""
    micro_batches = []
    for batch in batches:
        micro_batches.append(batch)
        if len(micro_batches) == accumulation:
            yield micro_batches
            micro_batches = []


def update(
    task: Task,
    model: nn.Module,
    optimizer: Any,
    micro_batches: list[Batch],
    accelerator: Accelerator,
    scale: float,
    max_grad_norm: float,
) -> tuple[Tensor, Any]:
    """One optimizer update: this rank's share of the global batch's mean loss, and the gradient norm before clipping.

    The mean of the ranks' shares is the mean over the global batch's examples or loss-carrying tokens, as the gradient
    is its gradient, however many of them a rank or a micro-batch has. Freezing happens inside, by itself: it watches
    the optimizer.

    Args:
        scale: See `GlobalBatchSampler.scale`.
    """
    total = torch.zeros((), device=accelerator.device)
    norm = None
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = task.loss(model, move(batch, accelerator.device)) * scale
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach().float() / len(micro_batches)
    return total, norm


def adapter_now(method: Method, progress: Progress) -> dict[str, Tensor]:
    """What adapter/ would hold, chosen by name, on the main process. A collective."""
    engine = progress.engine
    return engine.gather([n for n, p in engine.parameters.items() if method.saved(n, p.requires_grad)])


def keep_best(config: Config, method: Method, progress: Progress) -> BestEpoch | None:
    """What keeps the best epoch's adapter, as a part of what survives a restart."""
    if config.run.keep_best is None:
        return None
    best = BestEpoch(config.run.keep_best, config.run.patience, lambda: adapter_now(method, progress))
    progress.parts["run.keep_best"] = best
    return best


def save_adapter(
    method: Method, progress: Progress, run: RunDirectory, accelerator: Accelerator, best: BestEpoch | None
) -> None:
    """Write adapter/: the best epoch's where one is kept, else as it is now. A collective."""
    values = adapter_now(method, progress) if best is None else best.adapter

    def write() -> None:
        with writing("The adapter", run.adapter, "Make room, then --resume: the last checkpoint is whole."):
            method.save(progress.engine.model, run.adapter, values)

    on_main(accelerator, write)
