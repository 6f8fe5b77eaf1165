"""AFLoRA as a method of `aflora train`: the adapter, and its adaptive freezing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from ..adapter import AFLoRAConfig
from ..names import is_adapter, is_head
from .peft import PeftMethod


class AFLoRA(PeftMethod):
    """Low-rank paths whose projection matrices freeze one after the other (Eq. 1-5)."""

    name = "aflora"

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
        self.freezing = self.schedule(updates_per_epoch)  # steps are counted where nothing freezes, too

    def saved(self, name: str, trains: bool) -> bool:
        return is_adapter(name) or is_head(name) or trains  # a frozen A or B was learned like the rest
