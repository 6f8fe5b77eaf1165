"""Adaptive freezing in a training loop: the clock, the decisions, the drop, and what of it survives a restart."""

from ..freezing import FreezeEvent, FreezingConfig
from .adaptive import AdaptiveFreezing
from .freezable import Freezable
from .progress import Progress

__all__ = ["AdaptiveFreezing", "Freezable", "FreezeEvent", "FreezingConfig", "Progress"]
