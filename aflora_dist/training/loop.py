"""The main job: fine-tune, freeze, evaluate, write the run's directory. One function reads as the story."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import get_linear_schedule_with_warmup

from ..adapter.precision import check_precision
from ..compat.transformers import checkpoint_activations
from ..control import Progress
from ..engines import create_engine, engine_kind
from ..errors import AFLoRAError, writing
from ..freezing import CubicSchedule
from ..methods import Control, Method
from ..methods.choose import create_method, lora_parameters
from ..options import Config
from ..processes import launched_accelerator, launched_processes, on_main
from ..processes.meeting import meet
from ..store import fingerprint
from ..store.best import BestEpoch, check_metric
from ..store.held import Held
from ..store.resume import Checkpointer, find, finished
from ..store.rundir import RunDirectory
from ..tasks.base import Task
from ..tasks.batches import Batch, move
from ..tasks.classification import Classification
from ..tasks.limits import Limits
from ..tasks.model import fetch, resolve_name
from ..tasks.sft import LanguageModelling
from ..watch.log import TrainingLog
from ..watch.memory import MemoryHistory
from ..watch.rates import flops_per_token
from ..watch.stopping import StopRequest
from ..watch.traces import TraceRecorder, Window, windows
from . import compile_lock, deepspeed_file


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
    fetch(config.model, language_model=config.data.task == "sft")
    base, head = task.load(accelerator)
    meet()  # who could not load it has said so
    check_length(config, base)
    if config.train.gradient_checkpointing:
        checkpoint_activations(base)
    model = method.adapt(base, head)
    check_precision(model, accelerator)
    held = hold(model, head, config.model.train_new, method)
    sampler, batches = task.batches(accelerator)
    check_metric(config.run.keep_best, task.metrics())
    per_epoch = sampler.updates_per_epoch
    total_steps = config.train.epochs * per_epoch
    method.check(per_epoch)  # may refuse: before time is spent
    method.check_engine(engine_kind(accelerator), str(accelerator.mixed_precision))
    optimizer = create_optimizer(config, model, method)
    head_params = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and method.is_head(n))
    lora_r8 = lora_parameters(model)
    flops = flops_per_token(model, method.is_head)
    accumulate(config, accelerator, sampler.micro_batches)
    shard_by_block(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress(create_engine(accelerator, model, optimizer))
    control = method.attach(
        accelerator, model, optimizer, progress, lambda event: run.append("freeze_log.jsonl", asdict(event))
    )
    if held:
        progress.parts["model.train_new"] = Held(progress.engine, held)
    best = keep_best(config, method, progress)
    task.rehearse(model, accelerator)
    recorded = create_windows(config, control, total_steps, accelerator)
    history = create_history(config, recorded, accelerator)
    scheduler = create_scheduler(config, progress, total_steps)
    data = on_main(accelerator, lambda: trained_on(config, task))
    checkpointer = Checkpointer(run, accelerator, progress, scheduler, data, resolved)
    first_step = checkpointer.claim(resumed)  # all that can be refused has been
    set_seed(config.train.seed, device_specific=True)  # from here on every rank draws its own dropout
    profile = config.profile
    with (
        checkpointer.guarding(control),
        closing(
            TrainingLog(
                config, run, accelerator, progress, control, total_steps, head_params, lora_r8, first_step, flops
            )
        ) as log,
        closing(
            TraceRecorder(
                recorded,
                first_step,
                run.tensorboard,
                accelerator,
                model,
                optimizer,
                profile.ranks,
                profile.memory,
                history,
            )
        ) as traces,
        closing(StopRequest(run.stop_file, run.writes)) as stop_request,
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
                    tokens = sampler.tokens(step - epoch * per_epoch)
                    log.update(loss, norm, trained, tokens, [float(rate) for rate in scheduler.get_last_lr()])
                    scheduler.step()
                    traces.advance(step)
                    stop = stop_request.agreed(run.failure)
                    if stop or save_is_due(config, progress.step, per_epoch):
                        with record_function("aflora.save"):
                            checkpointer.save(log, evaluations)
                    if stop:
                        log.stopped()
                        control.interrupted()
                        accelerator.wait_for_everyone()
                        accelerator.end_training()
                        return None
                stop_request.settle(run.failure)
            with record_function("aflora.evaluate"):
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


def trained_on(config: Config, task: Task) -> dict[str, str | None]:
    """What must not have changed where a run goes on, by what a person calls it."""
    trained, measured = task.tokens()
    name = resolve_name(config.model.name, config.data.task == "sft")
    found = {
        "training data": fingerprint.of_examples(trained),
        "base weights": fingerprint.of_weights(name, config.model.revision),
        "settings of the base model (config.json)": fingerprint.of_settings(name, config.model.revision),
    }
    if config.run.keep_best is not None:  # what is kept hangs on it
        found["validation data"] = fingerprint.of_examples(measured)
    return found


def save_is_due(config: Config, step: int, per_epoch: int) -> bool:
    every = config.run.save_every
    return step % per_epoch == 0 if every is None else every > 0 and step % every == 0


def create_accelerator(config: Config) -> Accelerator:
    """The accelerator that the launcher asks for; DeepSpeed's batch and clipping settings are ours."""
    processes = launched_processes()
    check_batch(config, processes)
    check_ranks(config, processes)
    check_seed(config, processes)
    deepspeed_file.check(config, processes)
    compile_lock.check(deepspeed_file.compiled_ops())
    accelerator = launched_accelerator(step_scheduler_with_optimizer=False)
    accumulate(config, accelerator, config.train.accumulation)  # zero.Init wants to know before the data is known
    return accelerator


def check_ranks(config: Config, processes: int) -> None:
    unknown = [rank for rank in config.profile.ranks or [] if rank >= processes]
    if unknown and config.profile.enabled:
        raise AFLoRAError(f"profile.ranks names rank {unknown[0]}; there are {processes}, from 0 on.")


def check_batch(config: Config, processes: int) -> None:
    needed = processes * config.train.accumulation
    if config.train.batch_size < needed:
        raise AFLoRAError(
            f"train.batch_size={config.train.batch_size} cannot be split: {processes} processes x "
            f"train.accumulation={config.train.accumulation} = {needed} micro-batches, each with an example at least."
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


def check_length(config: Config, model: Any) -> None:
    Limits.of(model, config.model.name).check_length("data.max_length", config.data.max_length)


def check_seed(config: Config, processes: int) -> None:
    """Raise if a rank's seed, which is train.seed and its number, is one that NumPy does not take."""
    if config.train.seed + processes > 2**32:
        raise AFLoRAError(
            f"train.seed={config.train.seed} is too large for {processes} processes, whose last one's would be "
            f"{config.train.seed + processes - 1}: NumPy's are below 2^32."
        )


def hold(model: nn.Module, new: Sequence[str], train_new: Sequence[str] | None, method: Method) -> list[str]:
    """Have those of the new modules that are not to train keep their random start.

    Returns:
        The names of their parameters.

    Raises:
        AFLoRAError: `train_new` names what is not new.
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
    """AdamW over param groups: the adapter, and the head (if it trains) with its own learning rate, its biases last."""
    train = config.train
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = {name: p for name, p in trainable.items() if method.is_head(name)}
    spared = set() if train.decay_biases else {name for name in trainable if name.endswith("bias")}
    groups = [
        {"params": [p for n, p in trainable.items() if n not in head and n not in spared], "lr": train.learning_rate},
        {"params": [p for n, p in trainable.items() if n not in head and n in spared], "lr": train.learning_rate},
        {"params": [p for n, p in head.items() if n not in spared], "lr": train.head_learning_rate},
        {"params": [p for n, p in head.items() if n in spared], "lr": train.head_learning_rate},
    ]
    for group, decay in zip(groups, (train.weight_decay, 0.0) * 2, strict=True):
        group["weight_decay"] = decay
    return torch.optim.AdamW([group for group in groups if group["params"]])


def create_scheduler(config: Config, progress: Progress, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up and decay over t: a skipped update moves it, too."""
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)  # the first one was skipped
    return get_linear_schedule_with_warmup(progress.engine.optimizer, warm_up(config, total_steps), total_steps)


def warm_up(config: Config, total_steps: int) -> int:
    """Updates in which the learning rate rises."""
    return round(config.train.warmup_ratio * total_steps)


def create_windows(config: Config, control: Control, total_steps: int, accelerator: Accelerator) -> tuple[Window, ...]:
    profile = config.profile
    if not profile.enabled:
        return ()
    never = CubicSchedule(total_steps=total_steps, initial_steps=0, final_steps=0)
    return windows(control.schedule or never, len(control.freezable), profile.steps, profile.starts)


def create_history(config: Config, recorded: tuple[Window, ...], accelerator: Accelerator) -> MemoryHistory | None:
    """What snapshots CUDA memory around freezes, if that is asked for and there is any."""
    wanted = config.profile.memory and any(window.freezes for window in recorded)
    return MemoryHistory() if wanted and accelerator.device.type == "cuda" else None


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
    """What adapter/ would hold, chosen by name, on the main process. A collective.

    Raises:
        DivergedError: On every rank: it is not finite.
    """
    progress.check_finite()
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
