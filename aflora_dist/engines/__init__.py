"""One engine object per way of training: gradients by fragment, a drop, the whole state by name."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..errors import UnsupportedEngineError
from .base import Engine, Observer, Record
from .ddp import ReplicatedEngine
from .fsdp2 import Fsdp2Engine
from .optimizers import examine, plain, release
from .rehearsal import rehearse
from .transfer import Move, Piece, Renamed, place

__all__ = [
    "Engine",
    "Move",
    "Observer",
    "Piece",
    "Record",
    "Renamed",
    "create_engine",
    "engine_kind",
    "examine",
    "place",
    "plain",
    "rehearse",
    "release",
]


def engine_kind(accelerator: Accelerator) -> str:
    """What `create_engine` will call its engine (`Engine.kind`), before anything is prepared."""
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        return f"zero{plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def create_engine(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Engine:
    """The engine that `accelerator.prepare()` has set up, of model and optimizer as it returned them.

    Raises an UnsupportedEngineError where freezing would not be exact; the message says what to use instead.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from .deepspeed import create_zero_engine  # DeepSpeed is imported where it is used: it takes seconds

        return create_zero_engine(accelerator, model, optimizer)
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UnsupportedEngineError(
                "FSDP1 (FullyShardedDataParallel) flattens parameters into units that cannot lose one: use FSDP2 "
                "(fsdp_version: 2 in accelerate's configuration, see launch/fsdp2.yaml)."
            )
        return Fsdp2Engine(accelerator, model, optimizer)
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return ReplicatedEngine(accelerator, model, optimizer)
    raise UnsupportedEngineError(
        f"Freezing does not support {kind.value} yet: use one process, DDP, FSDP2, or DeepSpeed ZeRO-1, 2 or 3."
    )
