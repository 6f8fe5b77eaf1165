"""Counts, times and writes down what happens in a run; knows nothing of how to train."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..adapter.precision import beyond_float16
from ..control import Progress
from ..control.progress import Part
from ..errors import DivergedError
from ..methods import Control
from ..notices import logger
from ..options import Config
from ..processes import on_main
from ..store.best import BestEpoch
from ..store.rundir import RunDirectory
from ..tasks.base import Evaluation, Task
from ..version import __version__
from .rates import peak
from .resident import peak_resident
from .telemetry import Telemetry, open_telemetry, run_summary
from .timing import TrainingTime


class TrainingLog(Part):
    """metrics.jsonl, trackers, the progress bar, and result.json; a part of what survives a restart ("log").

    Attributes:
        evaluations: Metrics so far: after each epoch, or every run.eval_every updates.
        evaluated_at: After how many updates each was made.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        accelerator: Accelerator,
        progress: Progress,
        control: Control,
        total_steps: int,
        updates_per_epoch: int,
        head_params: int,
        lora_r8: int,
        flops_per_token: int | None = None,
    ) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.progress, self.control = progress, control
        self.total_steps, self.head_params, self.lora_r8 = total_steps, head_params, lora_r8
        self.updates_per_epoch = updates_per_epoch
        self.time = TrainingTime()
        self.save_seconds: list[float] = []
        self.trained_sum = 0  # sum over the updates so far of the adapter's trainable elements
        self.evaluations: list[dict[str, float]] = []
        self.evaluated_at: list[int] = []
        self._losses: list[Tensor] = []
        self._since: tuple[int, float] = (0, 0.0)
        self.tokens = self._tokens_at_line = 0  # so far, padding excluded, and up to the last line
        at_most = peak(accelerator, progress.engine.model)
        self._share = flops_per_token / at_most if flops_per_token and at_most else None  # of the peak, a token/s
        self.telemetry = Telemetry()
        self.bar = tqdm(disable=True)
        progress.parts["log"] = self

    def open(self, first_step: int) -> None:
        """Begin to write, once the run's directory is this run's: from this step on. A collective."""
        config = self.config
        on_main(self.accelerator, lambda: self._open_telemetry(first_step))
        if self.run.writes:
            what = f"{self.progress.engine.trainable_params:,} parameters train"
            if self.control.freezable:
                what = f"{len(self.control.freezable)} projection matrices train and then freeze"
            print(
                f"Fine-tuning {config.model.name} on {config.data.task}: {self.total_steps} updates of "
                f"{config.train.batch_size} examples, {self._engine}; {what}.",
                flush=True,
            )
        self.bar = tqdm(
            total=self.total_steps,
            initial=first_step,
            disable=not self.run.writes,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a job's log keeps every state of the bar
        )

    def _open_telemetry(self, first_step: int) -> None:
        facts = {"engine": self._engine, "mixed_precision": str(self.accelerator.mixed_precision)}
        self.telemetry = open_telemetry(self.config, self.run.path, first_step, facts)

    @property
    def _engine(self) -> str:
        return f"{self.accelerator.num_processes} x {self.progress.engine.kind}"

    @property
    def step(self) -> int:
        """Global batches done: the one clock's t."""
        return self.progress.step

    @property
    def train_seconds(self) -> float:
        """Training time so far, evaluation excluded."""
        return self.time.seconds[0]

    def update(self, loss: Tensor, norm: Any, trained: int, tokens: int, rates: list[float]) -> None:
        """Take note of one global batch (tokens: of all ranks) after the clock has; every `log_every` write a line."""
        self._losses.append(loss)
        self.tokens += tokens
        self.trained_sum += trained - self.head_params
        self.bar.update()
        if self.step % self.config.run.log_every == 0 or self.step == self.total_steps:
            self._write(norm, rates)

    def _write(self, norm: Any, rates: list[float]) -> None:
        mean = self.flush_losses()
        scores = self.control.scores()  # a score that is not finite ends the run, whoever watches
        state_bytes = self.progress.engine.optimizer_state_bytes()
        if not self.run.writes:
            return
        steps, seconds = self.step - self._since[0], self.train_seconds - self._since[1]
        self._since = (self.step, self.train_seconds)
        line = {
            "step": self.step - 1,
            "epoch": self.step / self.updates_per_epoch,
            "loss": mean,
            "lr": rates[0],
            "head_lr": rates[-1] if self.head_params else None,
            "grad_norm": float(norm) if norm is not None and np.isfinite(float(norm)) else None,  # JSON has no NaN
            "trainable_params": self.progress.engine.trainable_params,
            "frozen": len(self.control.frozen),
            **self.control.metrics(),
            "skipped": self.progress.skipped,
            "optimizer_state_bytes": state_bytes,
            "step_seconds": seconds / steps,
            "samples_per_second": steps * self.config.train.batch_size / seconds,
            **self._rates(self._tokens_at_line, seconds),
            "memory_bytes": memory(self.accelerator.device),
        }
        self._tokens_at_line = self.tokens
        self.run.append("metrics.jsonl", line)
        self.telemetry.scalars({f"train/{k}": v for k, v in line.items() if k != "step"}, self.step - 1)
        self.telemetry.scores(scores, self.step - 1)
        self.bar.set_postfix(
            loss=f"{mean:.3f}",
            frozen=f"{line['frozen']}/{len(self.control.freezable)}",
            trainable=f"{line['trainable_params']:,}",
            refresh=False,
        )

    def _rates(self, tokens_before: int, seconds: float) -> dict[str, float]:
        """Tokens a second since then, and the share of the devices' peak where it is known."""
        rate = (self.tokens - tokens_before) / seconds
        return {"tokens_per_second": rate} | ({} if self._share is None else {"mfu": rate * self._share})

    def flush_losses(self) -> float:
        """Mean loss since the last line, over all ranks. A collective.

        Raises:
            DivergedError: On every rank, naming the first update whose loss is not finite.
        """
        losses, self._losses = self._over_ranks(), []
        return float(np.mean(losses))

    def _over_ranks(self) -> list[float]:
        """The losses since the last line, each the mean over all ranks. A collective."""
        losses = self.accelerator.reduce(torch.stack(self._losses), "mean").tolist() if self._losses else []
        for step, loss in enumerate(losses, self.step - len(losses)):
            if not np.isfinite(loss):
                why = beyond_float16(self.progress.engine.model)
                raise DivergedError(
                    f"The loss of step {step} is {loss}. {why}Lower train.learning_rate or train.head_learning_rate."
                )
        return losses

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Counters and what the next line of metrics.jsonl is about. A collective.

        Raises:
            DivergedError: As `flush_losses`.
        """
        return {}, {
            "evaluations": self.evaluations,
            "evaluated_at": self.evaluated_at,
            "train_seconds": self.train_seconds,
            "train_cpu_seconds": self.time.seconds[1],
            "trained_sum": self.trained_sum,
            "losses": self._over_ranks(),
            "since": self._since,
            "tokens": [self.tokens, self._tokens_at_line],
            "control_seconds": self.control.seconds,
        }

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.evaluations, self.evaluated_at = list(record["evaluations"]), list(record["evaluated_at"])
        self.trained_sum = record["trained_sum"]
        self.time.seconds = record["train_seconds"], record["train_cpu_seconds"]
        self._losses = [torch.tensor(loss, device=self.accelerator.device) for loss in record["losses"]]
        self._since = (record["since"][0], record["since"][1])
        self.tokens, self._tokens_at_line = record["tokens"]
        self.control.seconds = record["control_seconds"]

    def evaluated(self, evaluation: Evaluation) -> None:
        """The model has been measured, with these metrics."""
        metrics = evaluation.metrics
        self.evaluations.append(metrics)
        self.evaluated_at.append(self.step)
        self.telemetry.scalars({f"eval/{name}": value for name, value in metrics.items()}, self.step - 1)
        ends = [(event.step, getattr(event, "backward_from", 0)) for event in self.control.events]
        self.telemetry.freeze_map(self.control.freezable, self.control.frozen, self.total_steps, self.step - 1, ends)
        self._say(
            "  ".join([f"epoch {self.epoch(len(self.evaluations)):g}:"] + [f"{k} {v:.4f}" for k, v in metrics.items()])
        )
        if evaluation.samples:
            self.telemetry.text("samples", evaluation.samples, self.step - 1)
            self._say(evaluation.samples)

    def epoch(self, evaluation: int) -> float:
        """After how many epochs an evaluation was, counted from 1."""
        epochs = round(self.evaluated_at[evaluation - 1] / self.updates_per_epoch, 4)
        return int(epochs) if epochs.is_integer() else epochs

    def ended_early(self, best: BestEpoch) -> None:
        """No evaluation has been better for as long as the patience lasts. A collective."""
        if self._losses:
            self.flush_losses()  # for the error that they may be
        epochs, since = self.total_steps / self.updates_per_epoch, self.epoch(best.epoch or 1)
        self._say(
            f"Ended after epoch {self.epoch(len(self.evaluations)):g} of {epochs:g}: {best.metric} has not improved "
            f"since epoch {since:g}. The schedules of learning rate and freezing were for all {self.total_steps} "
            f"updates (T), of which {self.step} were done."
        )
        if training := len({*self.control.freezable} - {*self.control.frozen}):
            logger.warning(
                f"{training} of {len(self.control.freezable)} projection matrices had not frozen yet. "
                f"For a whole schedule set train.epochs to what the best epoch needs, or raise run.patience."
            )

    def stopped(self) -> None:
        """The job was asked to leave early, and has saved."""
        self._say(f"Stopped as asked, after step {self.step - 1}. The same command with --resume goes on from there.")

    def _say(self, text: str) -> None:
        if self.run.writes:  # tqdm would write on every rank, its bar shown or not
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        self.telemetry.close()

    def describe(self, resolved: str) -> None:
        """Put what this run is, and its configuration, beside its charts."""
        facts = {
            "engine": self._engine,
            "updates": self.total_steps,
            "freezable matrices": len(self.control.freezable),
            "trainable parameters": f"{self.progress.engine.trainable_params:,} (head {self.head_params:,})",
            "LoRA r=8 on these layers": f"{self.lora_r8:,}",
            "aflora_dist": __version__,
            "torch": torch.__version__,
        }
        self.telemetry.text("run", run_summary(resolved, facts), self.step)

    def finished(self, task: Task, method: str, traces: list[str], best: BestEpoch | None) -> dict[str, Any]:
        """What result.json holds. A collective."""
        evaluations = self.evaluations
        result = self._result(task) | {"method": method, "traces": traces}
        result["last"] = {"epoch": self.epoch(len(evaluations)), "metrics": evaluations[-1]}
        if best is not None and best.epoch is not None:
            result["metrics"] = evaluations[best.epoch - 1]  # of what adapter/ holds
            result["best"] = {"metric": best.metric, "epoch": self.epoch(best.epoch), "metrics": result["metrics"]}
        self.telemetry.result(self.config, result, self.step - 1)
        if traces:
            self.telemetry.windows(self.run.path, self.step - 1)
        return result

    def _result(self, task: Task) -> dict[str, Any]:
        accelerator, control = self.accelerator, self.control
        if torch.cuda.is_available() and accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = peak_resident()
        per_rank = accelerator.gather(
            torch.tensor([[peak, control.seconds]], dtype=torch.float64, device=accelerator.device)
        )
        return {
            "task": task.name,
            "metrics": self.evaluations[-1],
            "evaluations": self.evaluations,
            "evaluated_at": self.evaluated_at,
            "engine": self.progress.engine.kind,
            "world_size": accelerator.num_processes,
            "mixed_precision": str(accelerator.mixed_precision),
            "steps": self.step,
            "skipped_updates": self.progress.skipped,
            "labels": task.labels,
            "train_examples": task.train_examples,
            "train_seconds": self.train_seconds,
            "train_cpu_seconds": self.time.seconds[1] if accelerator.device.type == "cpu" else None,
            "samples_per_second": self.step * self.config.train.batch_size / self.train_seconds,
            **self._rates(0, self.train_seconds),
            "avg_trainable_params": self.trained_sum / self.step,
            "lora_r8_trainable_params": self.lora_r8,
            "head_params": self.head_params,
            "freezable_matrices": len(control.freezable),
            "frozen_matrices": len({name for event in control.events for name in event.frozen} & {*control.freezable}),
            "freeze_events": len(control.events),
            "freeze_seconds_total": per_rank[:, 1].max().item(),
            "checkpoints": len(self.save_seconds),
            "checkpoint_seconds_total": sum(self.save_seconds),
            "peak_memory_bytes": int(per_rank[:, 0].max().item()),
        }


def memory(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
