"""Eq. 2-5, without torch.distributed and without any engine."""

from .policy import FreezingPolicy
from .schedule import CubicSchedule
from .score import SCORE_KINDS, Fragment, FreezingScore, ScoreKind

__all__ = ["SCORE_KINDS", "CubicSchedule", "Fragment", "FreezingPolicy", "FreezingScore", "ScoreKind"]
