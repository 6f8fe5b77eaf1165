"""What a user may say, and what of it is refused for itself."""

from .freezing import (
    FreezingKeywords,
    FreezingOptions,
    FreezingRule,
    FreezingScheduleConfig,
    ScheduleShape,
    ScoreKind,
)
from .job import (
    AdapterConfig,
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    ProfileConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "FreezingKeywords",
    "FreezingOptions",
    "FreezingRule",
    "FreezingScheduleConfig",
    "MethodConfig",
    "ModelConfig",
    "ProfileConfig",
    "RunConfig",
    "ScheduleShape",
    "ScoreKind",
    "TrainConfig",
]
