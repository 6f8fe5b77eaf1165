"""Counts, times and writes down what happens in a run; knows nothing of how to train."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from ..adaptive import AdaptiveFreezing
from ..errors import DivergedError
from .config import Config
from .data import Data
from .rundir import RunDirectory


class TrainingLog:
    """metrics.jsonl, TensorBoard, the progress bar, and result.json."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        accelerator: Accelerator,
        freezing: AdaptiveFreezing,
        total_steps: int,
        head_params: int,
    ) -> None:
        self.config, self.run, self.accelerator, self.freezing = config, run, accelerator, freezing
        self.total_steps, self.head_params = total_steps, head_params
        self.updates_per_epoch = total_steps // config.train.epochs
        self.step = 0
        self.train_seconds = 0.0
        self.trained_sum = 0  # sum over the updates so far of the adapter's trainable elements
        self._losses: list[Tensor] = []
        self._since: tuple[int, float] = (0, 0.0)
        self._started: float | None = None
        self.writer = SummaryWriter(str(run.tensorboard)) if run.writes and config.run.tensorboard else None
        if run.writes:
            print(
                f"Fine-tuning {config.model.name} on {config.data.task}: {total_steps} updates of "
                f"{config.train.batch_size} examples, {accelerator.num_processes} x {freezing.engine.kind}; "
                f"{len(freezing.freezable)} projection matrices train and then freeze.",
                flush=True,
            )
        self.bar = tqdm(total=total_steps, disable=not run.writes, desc="training", unit="step", dynamic_ncols=True)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What happens inside counts as training time."""
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self.train_seconds = self.seconds()
            self._started = None

    def seconds(self) -> float:
        """Training time so far, evaluation excluded."""
        return self.train_seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def update(self, loss: Tensor, norm: Any, trained: int, rates: list[float]) -> None:
        """Take note of one update; every `log_every` of them write a line."""
        self._losses.append(loss)
        self.trained_sum += trained - self.head_params
        self.step += 1
        self.bar.update()
        if self.step % self.config.run.log_every == 0 or self.step == self.total_steps:
            self._write(norm, rates)

    def _write(self, norm: Any, rates: list[float]) -> None:
        mean = self.flush_losses()
        steps, seconds = self.step - self._since[0], self.seconds() - self._since[1]
        self._since = (self.step, self.seconds())
        frozen, freezable = len(self.freezing.frozen), len(self.freezing.freezable)
        line = {
            "step": self.step - 1,
            "epoch": self.step / self.updates_per_epoch,
            "loss": mean,
            "lr": rates[0],
            "head_lr": rates[-1],
            "grad_norm": float(norm) if norm is not None and np.isfinite(float(norm)) else None,  # JSON has no NaN
            "trainable_params": self.freezing.trainable_params,
            "frozen": frozen,
            "freezing_fraction": self.freezing.schedule.fraction(self.step - 1) if freezable else 0.0,
            "samples_per_second": steps * self.config.train.batch_size / seconds,
        }
        self.run.append("metrics.jsonl", line)
        if self.writer is not None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    self.writer.add_scalar(f"train/{key}", value, self.step - 1)
        self.bar.set_postfix(
            loss=f"{mean:.3f}", frozen=f"{frozen}/{freezable}", trainable=f"{line['trainable_params']:,}"
        )

    def flush_losses(self) -> float:
        """Mean loss since the last line, over all ranks. A collective.

        Raises:
            DivergedError: On every rank, naming the first update whose loss is not finite.
        """
        losses = self.accelerator.reduce(torch.stack(self._losses), "mean").tolist()
        first = self.step - len(losses)
        self._losses = []
        for offset, loss in enumerate(losses):
            if not np.isfinite(loss):
                raise DivergedError(
                    f"The loss of step {first + offset} is {loss}. Lower train.learning_rate or "
                    f"train.head_learning_rate; what {self.run.path} holds up to there stays valid."
                )
        return float(np.mean(losses))

    def evaluated(self, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"eval/{name}", value, self.step - 1)
        self.bar.write(
            "  ".join([f"epoch {self.step / self.updates_per_epoch:g}:"] + [f"{k} {v:.4f}" for k, v in metrics.items()])
        )

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def result(self, evaluations: list[dict[str, float]], data: Data, lora_r8: int) -> dict[str, Any]:
        """What result.json holds. A collective."""
        accelerator, freezing = self.accelerator, self.freezing
        if torch.cuda.is_available() and accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        per_rank = accelerator.gather(
            torch.tensor([[peak, freezing.seconds]], dtype=torch.float64, device=accelerator.device)
        )
        return {
            "task": data.name,
            "metrics": evaluations[-1],
            "evaluations": evaluations,
            "engine": freezing.engine.kind,
            "world_size": accelerator.num_processes,
            "mixed_precision": str(accelerator.mixed_precision),
            "steps": self.step,
            "train_examples": len(data.train),
            "train_seconds": self.train_seconds,
            "samples_per_second": self.step * self.config.train.batch_size / self.train_seconds,
            "avg_trainable_params": self.trained_sum / self.step,
            "lora_r8_trainable_params": lora_r8,
            "head_params": self.head_params,
            "freezable_matrices": len(freezing.freezable),
            "freeze_events": len(freezing.events),
            "freeze_seconds_total": per_rank[:, 1].max().item(),
            "peak_memory_bytes": int(per_rank[:, 0].max().item()),
        }
