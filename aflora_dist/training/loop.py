"""`aflora train`: fine-tune, freeze, evaluate, write the run's directory. One function reads as the story."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.profiler import record_function

from ..errors import writing
from ..methods import Method
from ..methods.choose import create_method
from ..options import Config
from ..processes import on_main
from ..store.resume import finished
from ..store.rundir import RunDirectory
from ..tasks.batches import Batch, move
from ..watch.stopping import StopRequest
from .build import Training, create_accelerator


def train(config: Config, resolved: str, method: Method | None = None) -> dict[str, Any] | None:
    """Run `aflora train` on this rank.

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
    training = Training(config, resolved, method, accelerator, run)
    task, model, scheduler, best = training.task, training.model, training.scheduler, training.best
    sampler, progress, checkpointer = training.sampler, training.progress, training.checkpointer
    set_seed(config.train.seed, device_specific=True)  # from here on every rank draws its own dropout
    with (
        checkpointer.guarding(training.control),
        closing(training.log) as log,
        closing(training.traces()) as traces,
        StopRequest(run.stop_file, run.writes) as stop_request,
    ):
        log.open(training.first_step)
        if training.resumed:
            checkpointer.restore(training.resumed)
        log.describe(resolved)
        per_epoch, going_on = sampler.updates_per_epoch, True
        # One that goes on from an epoch's end begins at that end: random numbers are then drawn as they were.
        for epoch in range(max(progress.step - 1, 0) // per_epoch, config.train.passes(per_epoch)):
            first = epoch * per_epoch
            model.train()
            sampler.epoch, sampler.start = epoch, progress.step - first
            drawn = iter(training.batches)
            checkpointer.randomness.settle()
            with log.time.counted():
                going_on = not evaluation_is_due(training) or measure(training, stop_request)
                for micro_batches in updates(drawn, sampler.micro_batches) if going_on else ():
                    step, trained = progress.step, progress.engine.trainable_params
                    loss, norm = update(training, micro_batches, sampler.scale(step - first))
                    assert progress.step == step + 1, "one global batch, one tick of the clock"
                    rates = [float(rate) for rate in scheduler.get_last_lr()]
                    log.update(loss, norm, trained, sampler.tokens(step - first), rates)
                    scheduler.step()
                    traces.advance(step)
                    stop = stop_request.agreed(run.failure)
                    if stop or save_is_due(training):
                        with record_function("aflora.save"):
                            log.save_seconds.append(checkpointer.save())
                    if stop:
                        log.stopped()
                        training.control.interrupted()
                        accelerator.wait_for_everyone()
                        accelerator.end_training()
                        return None
                    if evaluation_is_due(training) and not measure(training, stop_request):
                        going_on = False
                        break
            if not going_on:
                break
        save_adapter(training)
        written = [str(path.relative_to(run.path)) for path in traces.written]
        result = log.finished(task, method.name, written, best)
        result["base_weights"] = checkpointer.data["base weights"]
    run.finish(result)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def updates(batches: Iterator[Batch], accumulation: int) -> Iterator[tuple[Batch, ...]]:
    """The micro-batches of one update after the other."""
    return zip(*[batches] * accumulation, strict=False)


def update(training: Training, micro_batches: Sequence[Batch], scale: float) -> tuple[Tensor, Any]:
    """One optimizer update: this rank's share of the global batch's mean loss, and the gradient norm before clipping.

    The mean of the ranks' shares is the mean over the global batch's examples or loss-carrying tokens, as the gradient
    is its gradient, however many of them a rank or a micro-batch has. Freezing happens inside, by itself: it watches
    the optimizer.

    Args:
        scale: See `GlobalBatchSampler.scale`.
    """
    accelerator, model, optimizer = training.accelerator, training.model, training.optimizer
    max_grad_norm = training.config.train.max_grad_norm or float("inf")
    total = torch.zeros((), device=accelerator.device)
    norm = None
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = training.task.loss(model, move(batch, accelerator.device)) * scale
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach().float() / len(micro_batches)
    return total, norm


def evaluation_is_due(training: Training) -> bool:
    """Whether the model as it is now is to be measured, and has not been."""
    step, every = training.progress.step, training.config.run.eval_every or training.sampler.updates_per_epoch
    due = step > 0 and (step % every == 0 or step == training.total_steps)
    return due and training.log.evaluated_at[-1:] != [step]


def measure(training: Training, stop_request: StopRequest) -> bool:
    """Measure the model as it is now; returns whether there is anything left to train. A collective."""
    log, best = training.log, training.best
    ended = training.progress.step == training.total_steps
    with log.time.paused():
        stop_request.settle(training.run.failure)
        with record_function("aflora.evaluate"):
            evaluation = training.task.evaluate(training.model, training.accelerator)
        training.model.train()
        log.evaluated(evaluation)
        if best is not None:
            best.evaluated(len(log.evaluations), evaluation.metrics)
            if best.exhausted and not ended:
                log.ended_early(best)
                return False
    return not ended


def save_is_due(training: Training) -> bool:
    step, every = training.progress.step, training.config.run.save_every
    every = training.sampler.updates_per_epoch if every is None else every
    return every > 0 and step % every == 0


def save_adapter(training: Training) -> None:
    """Write adapter/: the best epoch's where one is kept, else as it is now. A collective."""
    method, model, run = training.method, training.progress.engine.model, training.run
    values = training.adapter() if training.best is None else training.best.adapter

    def write() -> None:
        with writing("The adapter", run.adapter, "Make room, then --resume: the last checkpoint is whole."):
            run.refuse_another()
            method.save(model, run.adapter, values)
            if not (run.adapter / "adapter_config.json").exists():  # a model of its own wants its tokenizer
                training.task.tokenizer.save_pretrained(str(run.adapter))

    on_main(training.accelerator, write)
