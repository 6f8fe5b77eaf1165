"""DeepSpeed's ZeRO: the only folder that names its private interfaces."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from .zero import ZeroEngine


def create_zero_engine(accelerator: Accelerator, optimizer: Any) -> ZeroEngine:
    """The engine for the ZeRO stage that DeepSpeed was started with.

    Raises:
        UnsupportedEngineError: Names the feature of DeepSpeed that cannot be frozen exactly, and what to use instead.
    """
    ds = accelerator.deepspeed_engine_wrapped.engine
    if ds.zero_optimization_stage() == 3:
        from .zero3 import Zero3Engine

        return Zero3Engine(accelerator, optimizer)
    from .zero12 import Zero12Engine

    return Zero12Engine(accelerator, optimizer)
