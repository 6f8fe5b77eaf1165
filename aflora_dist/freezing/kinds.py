"""What freezing knows by name: importances to score a matrix by (Fig. 4), shapes of the schedule, rules."""

from __future__ import annotations

from typing import Literal

ScoreKind = Literal["gradient", "sensitivity", "relative"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("gradient", "sensitivity", "relative")

ScheduleShape = Literal["cubic", "quadratic"]
SCHEDULE_SHAPES: tuple[ScheduleShape, ...] = ("cubic", "quadratic")

FreezingRule = Literal["rank", "quantile"]
FREEZING_RULES: tuple[FreezingRule, ...] = ("rank", "quantile")
