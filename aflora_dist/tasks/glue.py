"""The eight GLUE tasks: columns, labels, metrics, GLUE's file layouts, and the paper's Table 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Task:
    """A sequence classification or regression task.

    Args:
        name: GLUE's name on the hub.
        text_columns: The one or two columns of text, as the hub names them.
        labels: Class names in the order of the hub's class numbers; None for regression.
        metrics: What is reported, the first being the one that Table 1 lists first.
        folder: GLUE's own folder of TSV files.
        files: (split, file) in that folder.
        tsv_columns: Column names in the TSV files of the text columns and of the label. Numbers are
            positions in files without a header.
        tsv_labels: Labels as the TSV files spell them; by default the class numbers.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    folder: str
    files: tuple[tuple[str, str], ...] = (("train", "train.tsv"), ("validation", "dev.tsv"))
    tsv_columns: tuple[str | int, ...]
    tsv_labels: tuple[str, ...] | None = None

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split, _ in self.files if split != "train")


_NLI = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            text_columns=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            folder="CoLA",
            tsv_columns=(3, 1),
        ),
        Task(
            name="sst2",
            text_columns=("sentence",),
            labels=("negative", "positive"),
            metrics=("accuracy",),
            folder="SST-2",
            tsv_columns=("sentence", "label"),
        ),
        Task(
            name="mrpc",
            text_columns=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            folder="MRPC",
            tsv_columns=("#1 String", "#2 String", "Quality"),
        ),
        Task(
            name="qqp",
            text_columns=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            folder="QQP",
            tsv_columns=("question1", "question2", "is_duplicate"),
        ),
        Task(
            name="stsb",
            text_columns=("sentence1", "sentence2"),
            labels=None,
            metrics=("pearson",),
            folder="STS-B",
            tsv_columns=("sentence1", "sentence2", "score"),
        ),
        Task(
            name="mnli",
            text_columns=("premise", "hypothesis"),
            labels=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            folder="MNLI",
            files=(
                ("train", "train.tsv"),
                ("validation_matched", "dev_matched.tsv"),
                ("validation_mismatched", "dev_mismatched.tsv"),
            ),
            tsv_columns=("sentence1", "sentence2", "gold_label"),
            tsv_labels=("entailment", "neutral", "contradiction"),
        ),
        Task(
            name="qnli",
            text_columns=("question", "sentence"),
            labels=_NLI,
            metrics=("accuracy",),
            folder="QNLI",
            tsv_columns=("question", "sentence", "label"),
            tsv_labels=_NLI,
        ),
        Task(
            name="rte",
            text_columns=("sentence1", "sentence2"),
            labels=_NLI,
            metrics=("accuracy",),
            folder="RTE",
            tsv_columns=("sentence1", "sentence2", "label"),
            tsv_labels=_NLI,
        ),
    )
}

# Table 5: epochs, learning rate of the head, learning rate, t_f in epochs. The rest is the same for
# all tasks and is what config.py defaults to.
_TABLE_5: dict[str, tuple[int, float, float, float]] = {
    "cola": (20, 4e-2, 1e-2, 14),
    "sst2": (10, 4e-3, 4e-3, 7),
    "mrpc": (20, 8e-2, 1e-2, 14),
    "qnli": (10, 4e-3, 1e-3, 7),
    "stsb": (20, 2e-2, 2e-3, 14),
    "rte": (20, 4e-2, 1e-3, 14),
    "mnli": (10, 4e-3, 1e-3, 7),
    "qqp": (10, 4e-3, 4e-3, 7),
}


def _table_5(task: str) -> dict[str, Any]:
    epochs, head_learning_rate, learning_rate, final_epochs = _TABLE_5[task]
    return {
        "model.name": "microsoft/deberta-v3-base",
        "data.task": task,
        "data.max_length": 256,
        "train.epochs": epochs,
        "train.batch_size": 64,
        "train.head_learning_rate": head_learning_rate,
        "train.learning_rate": learning_rate,
        "freezing.initial_epochs": 1.0,
        "freezing.final_epochs": final_epochs,
    }


# Found on the demo itself: 78 updates want larger steps of s_b, which starts at 0, than Table 5's.
_DEMO: dict[str, Any] = {
    "model.name": "demo",
    "data.task": "demo",
    "data.max_length": 128,
    "data.max_train_examples": 4992,
    "train.epochs": 1,
    "train.learning_rate": 4e-2,
    "train.head_learning_rate": 1e-2,
    "train.max_grad_norm": 1.0,
    "freezing.initial_epochs": 0.1,
    "freezing.final_epochs": 0.5,
    "run.dir": "runs/demo",
    "run.log_every": 1,
}

PRESETS: dict[str, dict[str, Any]] = {"demo": _DEMO, **{f"glue/{task}": _table_5(task) for task in TASKS}}
