"""By what a task is measured, and on what."""

from __future__ import annotations

from ..options import DataConfig
from ..store.best import LOWER_IS_BETTER
from ..tasks.glue import TASKS, metric_names


def measured_on(data: DataConfig, metric: str) -> list[str]:
    """Which options decide on what a task's methods are measured."""
    found = ["task", "path", "validation_file", "hold_out", "max_eval_examples", "label_column", "positive_label"]
    if data.validation_file is None:
        found += ["name", "subset", "revision", "validation_split"]
    if data.hold_out:
        found += ["name", "subset", "revision", "train_file", "train_split", "mix"]
    of_loss = ["loss_on", "system", "max_length"] if metric in LOWER_IS_BETTER else ["max_new_tokens"]
    return [*found, *(of_loss if data.task == "sft" else [])]


def metrics_of(kind: str) -> list[str]:
    """Those that data.task may be measured by, the one that it is by default first; which, only data tell."""
    if kind == "sft":
        return ["exact_match", "loss", "perplexity"]
    if kind not in TASKS:
        return ["accuracy", "f1", "pearson"] if kind == "files" else ["accuracy"]
    return metric_names(TASKS[kind].evaluation_splits, TASKS[kind].metrics)
