"""A user's loop in one process, as accelerate's documentation writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import patch_optimizer_step
from torch import nn

from aflora_dist import AdaptiveFreezing, FreezingConfig
from tests.workers.tiny import build_model, build_optimizer, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)


Create = Callable[[list[nn.Parameter]], Any]


class Loop:
    """A user's loop in one process."""

    def __init__(self, config: FreezingConfig = CONFIG, optimizer: Create | None = None, **adapter: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = build_model(**adapter)
        created = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer else None
        self.model, self.optimizer = self.accelerator.prepare(model, created or build_optimizer(model, "head"))
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config)

    def backward(self, number: int, factor: float = 1.0) -> None:
        self.accelerator.backward(self.model(**global_batch(number)).loss * factor)

    def step(self, number: int, clip: float | None = None, factor: float = 1.0) -> None:
        self.backward(number, factor)
        if clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, start: int = 0, stop: int = 12) -> None:
        for number in range(start, stop):
            self.step(number)

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if "aflora" in n or "classifier" in n}

    def scale_losses(self) -> None:
        """As accelerate does under fp16, which it has for GPUs only."""
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.accelerator.scaler = self.optimizer.scaler = scaler
        self.optimizer._accelerate_step_called = False
        inner = self.optimizer.optimizer
        self.optimizer._optimizer_original_step_method = inner.step
        self.optimizer._optimizer_patched_step_method = patch_optimizer_step(self.optimizer, inner.step)
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(inner)
        self.freezing.release()
        config = self.freezing.config
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config)


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
