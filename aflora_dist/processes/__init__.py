"""Processes that were launched together: what they know of each other, and how they wait for each other."""

from .cpu_group import cpu_group
from .launched import (
    complaint,
    first_on_node,
    launched_accelerator,
    launched_processes,
    on_main,
    refuse_lonely_processes,
)
from .meeting import meet, part
from .ranks import rank, world_size

__all__ = [
    "complaint",
    "cpu_group",
    "first_on_node",
    "launched_accelerator",
    "launched_processes",
    "meet",
    "on_main",
    "part",
    "rank",
    "refuse_lonely_processes",
    "world_size",
]
