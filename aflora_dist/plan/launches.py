"""A launch that has not happened, as far as the run's own checks look at an accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..engines import engine_kind

EngineKind = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which engine is started on how many processes. The checks take it where they take an `Accelerator`.

    Args:
        engine: As `Engine.kind`.
        num_processes: Ranks.
        mixed_precision: "no", "bf16" or "fp16".
        on_gpu: Whether batches are made for GPUs.
        process_index: The rank that asks.
    """

    engine: EngineKind
    num_processes: int = 1
    mixed_precision: str = "bf16"
    on_gpu: bool = True
    process_index: int = 0

    @classmethod
    def of(cls, accelerator: Accelerator) -> Launch:
        """The launch that this process is part of."""
        return cls(
            engine=cast("EngineKind", engine_kind(accelerator)),
            num_processes=accelerator.num_processes,
            mixed_precision=str(accelerator.mixed_precision),
            on_gpu=accelerator.device.type == "cuda",
            process_index=accelerator.process_index,
        )

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
