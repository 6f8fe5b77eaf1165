"""One engine object per way of training: gradients by fragment, state by name, rebuild in place."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from ..errors import UnsupportedEngineError
from .base import Engine, ParameterState
from .native import ReplicatedEngine

__all__ = ["Engine", "ParameterState", "create_engine"]


def create_engine(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> Engine:
    """The engine that `accelerator.prepare()` has set up.

    Args:
        model, optimizer: What `accelerator.prepare()` returned.

    Raises:
        UnsupportedEngineError: No exact freezing here; the message says what to use instead.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        if accelerator.deepspeed_engine_wrapped is None:
            raise UnsupportedEngineError("Pass the model through accelerator.prepare() before AdaptiveFreezing.")
        from .deepspeed.zero import check_supported  # DeepSpeed is imported where it is used: it takes seconds

        check_supported(accelerator.deepspeed_engine_wrapped.engine)
        if accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage() == 3:
            from .deepspeed.zero3 import Zero3Engine

            return Zero3Engine(accelerator, model)
        from .deepspeed.zero12 import Zero12Engine

        return Zero12Engine(accelerator, model)
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        inner = optimizer
        while not isinstance(inner, Optimizer) or hasattr(inner, "optimizer"):
            inner = inner.optimizer
        return ReplicatedEngine(accelerator, model, inner)
    raise UnsupportedEngineError(
        f"AFLoRA's freezing does not support {kind.value} yet: use one process, DDP, or DeepSpeed ZeRO-1, 2 or 3."
    )
