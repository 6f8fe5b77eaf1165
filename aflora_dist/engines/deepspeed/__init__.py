"""DeepSpeed's ZeRO: the only folder that uses its private interfaces, which compat/deepspeed.py lists."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from ...compat.accelerate import schedulers
from ...errors import UnsupportedEngineError
from .supported import check_prepared, check_settings
from .zero import ZeroEngine

__all__ = ["check_settings", "create_zero_engine"]


def create_zero_engine(accelerator: Accelerator, model: Any, optimizer: Any) -> ZeroEngine:
    """The engine for the ZeRO stage that DeepSpeed was started with.

    Args:
        model, optimizer: What `accelerator.prepare()` returned.

    Raises:
        UnsupportedEngineError: Names the feature of DeepSpeed that cannot be frozen exactly, and what to use instead.
    """
    check_prepared(accelerator, model, optimizer)
    ds = accelerator.deepspeed_engine_wrapped.engine
    _check_schedule(accelerator, ds)
    if ds.zero_optimization_stage() == 3:
        from .zero3 import Zero3Engine

        return Zero3Engine(accelerator, optimizer)
    from .zero12 import Zero12Engine

    return Zero12Engine(accelerator, optimizer)


def _check_schedule(accelerator: Accelerator, ds: Any) -> None:
    """Refuse a schedule of DeepSpeed's that nobody holds: it sets every learning rate, whatever else sets them."""
    own = None if ds.client_lr_scheduler is not None else ds.lr_scheduler
    if own is not None and not any(scheduler.scheduler is own for scheduler in schedulers(accelerator)):
        raise UnsupportedEngineError(
            f"DeepSpeed's configuration has a scheduler section ({type(own).__name__}), by which DeepSpeed sets the "
            f"learning rates of all param groups itself. Remove it, or pass accelerate.utils.DummyScheduler(optimizer) "
            f"through accelerator.prepare() and use no other scheduler."
        )
