"""Adaptive freezing with transformers' Trainer: one callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .control import AdaptiveFreezing, FreezeEvent, FreezingConfig
from .errors import AFLoRAError
from .freezing import ScoreKind


class FreezingCallback(TrainerCallback):
    """Attaches `AdaptiveFreezing` when training begins; nothing else changes.

    Args:
        trainer: The Trainer whose model is an AFLoRA model. Use as
            `trainer.add_callback(FreezingCallback(trainer))`.
        initial_epochs: t_i in epochs; by default one, or a tenth of the training where that is less.
        final_epochs: t_f in epochs; by default 70% of the training.
        on_freeze: Called with each `FreezeEvent`.
        beta1, beta2, score, pairwise, every: As in `FreezingConfig`.

    Attributes:
        freezing: The `AdaptiveFreezing`, once training has begun.
    """

    def __init__(
        self,
        trainer: Trainer,
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            raise AFLoRAError(
                "Trainer's checkpoints do not hold the freezing scores, so training cannot go on from one exactly. "
                "Start from the beginning (resume_from_checkpoint=None)."
            )
        if self.freezing is not None:
            self.freezing.release()  # of a training that was interrupted
        total = state.max_steps
        if args.max_steps <= 0:  # Trainer has counted epochs, perhaps a fraction of one
            per_epoch = total / args.num_train_epochs
        else:
            loader = kwargs["train_dataloader"]
            per_epoch = len(loader) / args.gradient_accumulation_steps if hasattr(loader, "__len__") else total
        initial = per_epoch * self.initial_epochs if self.initial_epochs is not None else min(per_epoch, 0.1 * total)
        final = per_epoch * self.final_epochs if self.final_epochs is not None else 0.7 * total
        steps = {"total_steps": total, "initial_steps": round(initial), "final_steps": round(final)}
        config = FreezingConfig(**steps, **self.options)
        self.freezing = AdaptiveFreezing(
            self.trainer.accelerator,
            self.trainer.model_wrapped,
            self.trainer.optimizer,
            config,
            on_freeze=self.on_freeze,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.freezing is not None:
            self.freezing.release()
