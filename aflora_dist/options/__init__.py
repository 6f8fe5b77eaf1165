"""What a user may say, and what of it is refused for itself."""

from .data import DataConfig
from .freezing import (
    ORDERS,
    FreezingKeywords,
    FreezingOptions,
    FreezingRule,
    FreezingScheduleConfig,
    Granularity,
    ScheduleShape,
    ScoreKind,
    Unit,
)
from .job import (
    AdapterConfig,
    Config,
    MethodConfig,
    ModelConfig,
    ProfileConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "ORDERS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "FreezingKeywords",
    "FreezingOptions",
    "FreezingRule",
    "FreezingScheduleConfig",
    "Granularity",
    "MethodConfig",
    "ModelConfig",
    "ProfileConfig",
    "RunConfig",
    "ScheduleShape",
    "ScoreKind",
    "TrainConfig",
    "Unit",
]
