"""DeepSpeed's device while a ZeRO optimizer is made anew: its allocator is left alone, and it is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While entered, `owner.name` is `value`."""
    original, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


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
            stack.enter_context(replaced(accelerator, name, lambda *args: None))
        stack.enter_context(replaced(accelerator, "available_memory", with_cache))
        yield


def synchronize() -> None:
    """Wait for what the device has been given to do, on DeepSpeed's own streams, too."""
    if get_accelerator().is_available():
        get_accelerator().synchronize()
