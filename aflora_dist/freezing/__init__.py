"""Eq. 2-5, without torch.distributed and without any engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import FreezeEvent, FreezingConfig
from .order import fixed_scores
from .policy import FreezingPolicy, policy_for
from .schedule import CubicSchedule, Moments

if TYPE_CHECKING:
    from .matrix import MatrixScore, PartialImportance
    from .score import Fragment, FreezingScore

__all__ = [
    "CubicSchedule",
    "Fragment",
    "FreezeEvent",
    "FreezingConfig",
    "FreezingPolicy",
    "FreezingScore",
    "MatrixScore",
    "Moments",
    "PartialImportance",
    "fixed_scores",
    "policy_for",
]

# What computes with torch is imported when first asked for: a command line needs the rest alone.
_WITH_TORCH = {"Fragment": "score", "FreezingScore": "score", "MatrixScore": "matrix", "PartialImportance": "matrix"}

if not TYPE_CHECKING:  # a type checker would take any name to be here

    def __getattr__(name: str) -> Any:
        if name not in _WITH_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_WITH_TORCH[name]}", __name__), name)
