"""What a user may say, and what of it is refused for itself."""

from .checked import flat
from .data import DataConfig
from .freezing import (
    ORDERS,
    FreezingEpochs,
    FreezingKeywords,
    FreezingOptions,
    FreezingScheduleConfig,
    ScheduleShape,
    ScoreKind,
    Unit,
)
from .job import AdapterConfig, Config, MethodConfig, ModelConfig, ProfileConfig, RunConfig, TrainConfig

__all__ = [
    "ORDERS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "FreezingEpochs",
    "FreezingKeywords",
    "FreezingOptions",
    "FreezingScheduleConfig",
    "MethodConfig",
    "ModelConfig",
    "ProfileConfig",
    "RunConfig",
    "ScheduleShape",
    "ScoreKind",
    "TrainConfig",
    "Unit",
    "changes_nothing",
    "flat",
]

_CHANGES_NOTHING = {  # groups and options
    "preset",
    "run",
    "profile",
    "data.path",
    "data.name",  # of the same data, as tokens tell
    "data.train_file",
    "data.validation_file",
    "data.tokens_per_micro_batch",
    "train.accumulation",
    "train.eval_batch_size",
    "train.gradient_checkpointing",
}


def changes_nothing(option: str) -> bool:
    """Whether GROUP.KEY changes neither model nor batches: it may differ between a run and its continuation."""
    return not _CHANGES_NOTHING.isdisjoint({option, option.partition(".")[0]})
