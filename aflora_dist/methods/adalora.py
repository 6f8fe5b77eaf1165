"""AdaLoRA as a method of `aflora train`: PEFT's, told of every update so that it can reallocate ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from ..control import Progress
from ..engines.transfer import Piece
from ..errors import AFLoRAError, UnsupportedEngineError
from ..names import of_base
from ..options import Config
from .base import Control, NoControl
from .peft import Peft

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # of RankAllocator; `ipt` is made anew by each update


class AdaLora(Peft):
    """LoRA as a singular value decomposition, whose least important singular values are set to zero."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.freezes:
            raise AFLoRAError(
                "AdaLoRA itself decides while training which of its singular values go on: drop freezing.enabled, or "
                "take method.name=lora."
            )
        if config.data.task == "sft" and self.options.get("orth_reg_weight") != 0:
            raise AFLoRAError(
                "AdaLoRA's orthogonal regularisation is added by PEFT to the loss that the model computes, and for "
                "language models aflora train computes it itself, token by token. Train without: "
                """--method.options '{"orth_reg_weight": 0}', or with method.name=lora."""
            )

    def _set_here(self) -> set[str]:
        return super()._set_here() | {"total_step", "rank_pattern"}

    def _arguments(self, model: Any, head: Sequence[str]) -> dict[str, Any]:
        # How long the training is becomes known in check().
        return {**super()._arguments(model, head), "total_step": 2**62, "tinit": 0, "tfinal": 0}

    def adapt(self, model: Any, head: Sequence[str]) -> PeftModel:
        adapted = super().adapt(model, head)
        for name, parameter in adapted.named_parameters():
            if ".ranknum." in name:  # PEFT makes it anew, to train, where it moves it to the model's device
                parameter.requires_grad_(False)
        self._tuning = adapted.peft_config["default"]
        return adapted

    def check(self, updates_per_epoch: int) -> None:
        tuning: Any = self._tuning
        total = self.config.train.updates(updates_per_epoch)
        first, last = self.options.get("tinit", total // 10), self.options.get("tfinal", total // 5)
        for option in ("tinit", "tfinal", "target_r", "init_r"):
            if not isinstance(self.options.get(option, 0), int):
                raise AFLoRAError(f"method.options {option} is a whole number, got {self.options[option]!r}.")
        if first < 0 or last < 0 or first + last >= total:
            raise AFLoRAError(
                f"AdaLoRA's schedule does not fit: tinit + tfinal = {first} + {last} updates, but the training has "
                f"{total}. Train longer, or lower one of them (method.options)."
            )
        if not 0 < tuning.target_r < tuning.init_r:
            raise AFLoRAError(
                f"AdaLoRA lowers the mean rank from init_r to target_r, but method.options say init_r="
                f"{tuning.init_r} and target_r={tuning.target_r}. For a fixed rank use method.name=lora."
            )
        tuning.total_step, tuning.tinit, tuning.tfinal = total, first, last

    def check_engine(self, kind: str, precision: str) -> None:
        if kind not in ("single", "ddp"):
            raise UnsupportedEngineError(
                f"AdaLoRA scores its matrices by whole gradients after each update, and {kind} keeps pieces of them "
                f"on every rank. Use one process or launch/ddp.yaml, or method.name=lora."
            )
        if precision == "fp16":
            raise UnsupportedEngineError(
                "AdaLoRA would score the infinite gradients of updates that fp16 skips. Use bf16, or method.name=lora."
            )

    def attach(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, progress: Progress, log: Callable[[Any], None]
    ) -> Control:
        return RankAllocation(progress)

    def save(self, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
        # Of what is saved, which may be an earlier epoch's; PEFT's own pattern is that of the last allocation.
        model.peft_config["default"].rank_pattern = {
            of_base(name): (value.flatten() != 0).tolist() for name, value in values.items() if ".lora_E." in name
        }
        super().save(model, folder, values)


class RankAllocation(NoControl):
    """Calls PEFT's `update_and_allocate` after each update, while its gradients are there, and keeps its state.

    Its steps count from 1, so that the last allocation (total_step - tfinal) comes even where tfinal is 0.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress, self.engine = progress, progress.engine
        self.tuner = cast("Any", self.engine.model.base_model)
        self.allocator = self.tuner.rankallocator
        self.tuning = self.tuner.peft_config[self.tuner.trainable_adapter_name]
        self.progress.after_batch.append(self._after_batch)
        self.progress.parts["adalora"] = self

    def _after_batch(self) -> None:
        start = time.perf_counter()
        for parameter in self._matrices().values():
            if parameter.grad is None:  # a layer outside of this update's graph
                parameter.grad = torch.zeros_like(parameter)
        self.tuner.update_and_allocate(self.progress.step + 1)
        self.seconds += time.perf_counter() - start

    def metrics(self) -> Mapping[str, float]:
        pattern = self.tuning.rank_pattern  # none before the first allocation
        ranks = [sum(kept) for kept in pattern.values()] if pattern else [self.tuning.init_r]
        return {"mean_rank": sum(ranks) / len(ranks)}

    # -- checkpoints -------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        pieces = self._pieces() if self.engine.rank == 0 else []
        numels = {f"{kind}/{name}": p.numel() for kind in self._held() for name, p in self._matrices().items()}
        record = {"schedule": self._schedule(), "averages": bool(numels), "rank_pattern": self.tuning.rank_pattern}
        return self.engine.collect(pieces, numels), record

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self.tuning.rank_pattern = record["rank_pattern"]
        self.allocator.reset_ipt()
        if record["averages"]:
            for kind in ("ipt", *_AVERAGES):
                getattr(self.allocator, kind).update({n: torch.zeros_like(p) for n, p in self._matrices().items()})
            keys = [f"{kind}/{name}" for kind in _AVERAGES for name in self._matrices()]
            self.engine.fill(tensors, keys, self._pieces())

    def check(self, record: Mapping[str, Any]) -> None:
        for option, here in self._schedule().items():
            if (there := record["schedule"].get(option)) != here:
                raise AFLoRAError(
                    f"The checkpoint is of another schedule: {option} of AdaLoRA is {there} there and {here} here."
                )

    def _schedule(self) -> dict[str, Any]:
        options = ("total_step", "tinit", "tfinal", "deltaT", "init_r", "target_r", "beta1", "beta2")
        return {option: getattr(self.tuning, option) for option in options}

    def _matrices(self) -> dict[str, nn.Parameter]:
        """What the allocator scores, by its names."""
        adapter = self.allocator.adapter_name
        return {n: p for n, p in self.tuner.model.named_parameters() if "lora_" in n and adapter in n}

    def _held(self) -> tuple[str, ...]:
        """The averages that there are: none before the first update, and after the last allocation."""
        return _AVERAGES if self.allocator.exp_avg_ipt else ()

    def _pieces(self) -> list[Piece]:
        return [
            Piece(f"{kind}/{name}", 0, getattr(self.allocator, kind)[name].view(-1))
            for kind in self._held()
            for name in self._matrices()
        ]
