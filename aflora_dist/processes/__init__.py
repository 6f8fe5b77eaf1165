"""Processes that were launched together: what they know of each other, and how they wait for each other."""

from .launched import (
    complaint,
    first_on_node,
    launched_accelerator,
    launched_processes,
    on_main,
    refuse_lonely_processes,
)

__all__ = [
    "complaint",
    "first_on_node",
    "launched_accelerator",
    "launched_processes",
    "on_main",
    "refuse_lonely_processes",
]
