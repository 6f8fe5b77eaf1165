"""A launch that has not happened, as far as the run's own checks look at an accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..engines import engine_kind

EngineKind = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)
# As in ds_configs/: elements.
_REDUCE_BUCKET, _LIVE_PARAMETERS = 50_000_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which engine is started on how many processes. The checks take it where they take an `Accelerator`.

    Args:
        engine: As `Engine.kind`.
        num_processes: Ranks.
        mixed_precision: "no", "bf16" or "fp16".
        on_gpu: Whether batches are made for GPUs.
        process_index: The rank that asks.
        reduce_bucket: Elements of DeepSpeed's buffers for gradients.
        live_parameters: Elements that ZeRO-3 may hold gathered.
        offloaded_optimizer, offloaded_weights: Whether they are in the memory of the CPU.
    """

    engine: EngineKind
    num_processes: int = 1
    mixed_precision: str = "bf16"
    on_gpu: bool = True
    process_index: int = 0
    reduce_bucket: int = _REDUCE_BUCKET
    live_parameters: int = _LIVE_PARAMETERS
    offloaded_optimizer: bool = False
    offloaded_weights: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator) -> Launch:
        """The launch that this process is part of."""
        common: dict[str, Any] = {
            "engine": engine_kind(accelerator),
            "num_processes": accelerator.num_processes,
            "mixed_precision": str(accelerator.mixed_precision),
            "on_gpu": accelerator.device.type == "cuda",
            "process_index": accelerator.process_index,
        }
        if (plugin := accelerator.state.deepspeed_plugin) is not None:
            zero = plugin.deepspeed_config.get("zero_optimization", {})
            return cls(
                reduce_bucket=_number(zero.get("reduce_bucket_size"), 500_000_000),
                live_parameters=_number(zero.get("stage3_max_live_parameters"), _LIVE_PARAMETERS),
                offloaded_optimizer=_elsewhere(zero.get("offload_optimizer")),
                offloaded_weights=_elsewhere(zero.get("offload_param")),
                **common,
            )
        return cls(**common)

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def distributed_type(self) -> DistributedType:
        if self.engine.startswith("zero"):
            return DistributedType.DEEPSPEED
        return {"single": DistributedType.NO, "fsdp2": DistributedType.FSDP}.get(self.engine, DistributedType.MULTI_GPU)

    @property
    def state(self) -> Any:
        stage = int(self.engine[4:]) if self.engine.startswith("zero") else None
        return SimpleNamespace(deepspeed_plugin=None if stage is None else SimpleNamespace(zero_stage=stage))

    @property
    def half(self) -> bool:
        """Whether the model computes in 16 bits."""
        return self.mixed_precision in ("bf16", "fp16")

    def __str__(self) -> str:
        return f"{self.num_processes} x {self.engine}"


def _number(said: Any, otherwise: int) -> int:
    return int(said) if isinstance(said, int | float) else otherwise  # "auto", or nothing


def _elsewhere(said: Any) -> bool:
    return isinstance(said, dict) and said.get("device", "none") != "none"
