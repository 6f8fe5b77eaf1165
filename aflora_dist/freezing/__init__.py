"""Eq. 2-5, without torch.distributed and without any engine."""

from typing import TYPE_CHECKING, Any

from ..options import FreezingRule, ScheduleShape, ScoreKind
from .config import FreezeEvent, FreezingConfig
from .policy import FreezingPolicy, QuantilePolicy
from .schedule import CubicSchedule, whole_steps

if TYPE_CHECKING:
    from .score import Fragment, FreezingScore

__all__ = [
    "CubicSchedule",
    "Fragment",
    "FreezeEvent",
    "FreezingConfig",
    "FreezingPolicy",
    "FreezingRule",
    "FreezingScore",
    "QuantilePolicy",
    "ScheduleShape",
    "ScoreKind",
    "whole_steps",
]

if not TYPE_CHECKING:  # a type checker would take any name to be here

    def __getattr__(name: str) -> Any:
        """What computes with torch is imported when first asked for: a command line needs the rest alone."""
        if name not in ("Fragment", "FreezingScore"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import score

        return getattr(score, name)
