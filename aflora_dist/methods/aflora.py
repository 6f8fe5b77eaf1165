"""AFLoRA as a method of the main job: the adapter, and its adaptive freezing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from ..adapter import AFLoRAConfig
from ..control import AdaptiveFreezing, FreezeEvent, FreezingConfig, Progress
from ..freezing import whole_steps
from ..names import is_adapter, is_head
from ..options import Config
from .peft import PeftMethod


class AFLoRA(PeftMethod):
    """Low-rank paths whose projection matrices freeze one after the other (Eq. 1-5)."""

    name = "aflora"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.freezing: FreezingConfig | None = None  # once check() knows how long the training is

    def adapt(self, model: Any, head: Sequence[str]) -> PeftModel:
        """Put the adapter in, with the head among the modules to save.

        Raises:
            AFLoRAError: No module matched, nothing is freezable, or the rank is not positive.
        """
        options = self.config.adapter
        tuning = AFLoRAConfig(
            r=options.r,
            target_modules=options.target_modules,
            freezable=options.freezable,
            freezing=options.freezing,
            aflora_dropout=options.dropout,
            modules_to_save=self.whole(head) or None,
            task_type=self.task_type,
        )
        return self.put_in(model, lambda: tuning)

    def check(self, updates_per_epoch: int) -> None:
        self.freezing = self._schedule(updates_per_epoch)

    def attach(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        progress: Progress,
        log: Callable[[FreezeEvent], None],
    ) -> AdaptiveFreezing:
        assert self.freezing is not None, "check() comes first"
        return AdaptiveFreezing(accelerator, model, optimizer, self.freezing, on_freeze=log, progress=progress)

    def saved(self, name: str, trains: bool) -> bool:
        return is_adapter(name) or is_head(name) or trains  # a frozen A or B was learned like the rest

    def _schedule(self, updates_per_epoch: int) -> FreezingConfig:
        epochs, freezing = self.config.train.epochs, self.config.freezing
        adaptive = self.config.adapter.freezing == "adaptive"
        t_i, t_f = freezing.epochs(epochs) if adaptive else (0, 0)
        total = epochs * updates_per_epoch
        initial, final = whole_steps(t_i * updates_per_epoch, t_f * updates_per_epoch, total)
        return FreezingConfig(
            total_steps=total,
            initial_steps=initial,
            final_steps=final,
            **freezing.keywords(),
        )
