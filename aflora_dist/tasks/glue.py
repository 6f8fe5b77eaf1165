"""The eight GLUE tasks: columns, labels, metrics, and GLUE's file layouts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GlueTask:
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

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            name="cola",
            text_columns=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            folder="CoLA",
            tsv_columns=(3, 1),
        ),
        GlueTask(
            name="sst2",
            text_columns=("sentence",),
            labels=("negative", "positive"),
            metrics=("accuracy",),
            folder="SST-2",
            tsv_columns=("sentence", "label"),
        ),
        GlueTask(
            name="mrpc",
            text_columns=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            folder="MRPC",
            tsv_columns=("#1 String", "#2 String", "Quality"),
        ),
        GlueTask(
            name="qqp",
            text_columns=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            folder="QQP",
            tsv_columns=("question1", "question2", "is_duplicate"),
        ),
        GlueTask(
            name="stsb",
            text_columns=("sentence1", "sentence2"),
            labels=None,
            metrics=("pearson",),
            folder="STS-B",
            tsv_columns=("sentence1", "sentence2", "score"),
        ),
        GlueTask(
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
        GlueTask(
            name="qnli",
            text_columns=("question", "sentence"),
            labels=_NLI,
            metrics=("accuracy",),
            folder="QNLI",
            tsv_columns=("question", "sentence", "label"),
            tsv_labels=_NLI,
        ),
        GlueTask(
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
