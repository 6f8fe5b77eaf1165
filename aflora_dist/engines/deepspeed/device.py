"""What is kept from happening while a ZeRO optimizer is made anew, and waiting for DeepSpeed's device."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator

from ...compat.patch import patch


@contextmanager
def allocator_left_alone() -> Iterator[None]:
    """While entered, DeepSpeed neither empties the device allocator's cache nor starts its peak anew.

    A new ZeRO optimizer does both for each of its groups. After a freeze the next step would allocate everything anew,
    and the peak that is reported would be the one since the last freeze.
    """
    accelerator = get_accelerator()
    free = accelerator.available_memory

    def with_cache(*args: Any) -> int:
        """What the driver has left (NVML), and what the allocator keeps for the next who asks."""
        allocated = accelerator.memory_allocated(*args)
        available = free(*args) + accelerator.memory_reserved(*args) - allocated
        return min(available, accelerator.total_memory(*args) - allocated)

    with ExitStack() as stack:
        for name in ("empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"):
            stack.callback(patch(accelerator, name, lambda *args: None))
        stack.callback(patch(accelerator, "available_memory", with_cache))
        yield


def synchronize() -> None:
    """Wait for what the device has been given to do, on DeepSpeed's own streams, too."""
    if get_accelerator().is_available():
        get_accelerator().synchronize()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A new ZeRO optimizer is thousands of objects that take the place of as many, which go by themselves.

    Before they do, Python would think that the heap has grown, and look through all of it: 0.3 s with transformers
    imported, several times what the rest of a drop takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
