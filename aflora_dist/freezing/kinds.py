"""The importances by which a projection matrix may be scored (Fig. 4), by name."""

from __future__ import annotations

from typing import Literal

ScoreKind = Literal["gradient", "sensitivity", "relative"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("gradient", "sensitivity", "relative")
