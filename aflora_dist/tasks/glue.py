"""The eight GLUE tasks: columns, labels, metrics, and GLUE's file layouts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """A sequence classification or regression task.

    Args:
        name: GLUE's name on the hub.
        folder: GLUE's own folder of TSV files.
        text_columns: The one or two columns of text, as the hub names them.
        labels: Class names in the order of the hub's class numbers; None for regression.
        metrics: What is reported, the first being the one that Table 1 lists first.
        own_columns: Names in the TSV files of the columns of text and of the label, where they are not the hub's and
            "label". Numbers are positions in files without a header.
        tsv_labels: Labels as the TSV files spell them; by default the class numbers.
        files: (split, file) in the folder.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    own_columns: tuple[str | int, ...] = ()
    tsv_labels: tuple[str, ...] | None = None
    files: tuple[tuple[str, str], ...] = (("train", "train.tsv"), ("validation", "dev.tsv"))

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return tuple(split for split, _ in self.files if split != "train")

    @property
    def tsv_columns(self) -> tuple[str | int, ...]:
        return self.own_columns or (*self.text_columns, "label")


_PAIR, _QUESTIONS, _F1 = ("sentence1", "sentence2"), ("question1", "question2"), ("accuracy", "f1")
_RTE, _MNLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
_IN_MNLI = tuple((f"validation_{part}", f"dev_{part}.tsv") for part in ("matched", "mismatched"))
_ALL = (
    GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), (3, 1)),
    GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive")),
    GlueTask("mrpc", "MRPC", _PAIR, ("not_equivalent", "equivalent"), _F1, ("#1 String", "#2 String", "Quality")),
    GlueTask("qqp", "QQP", _QUESTIONS, ("not_duplicate", "duplicate"), _F1, (*_QUESTIONS, "is_duplicate")),
    GlueTask("stsb", "STS-B", _PAIR, None, ("pearson",), (*_PAIR, "score")),
    GlueTask(
        name="mnli",
        folder="MNLI",
        text_columns=("premise", "hypothesis"),
        labels=_MNLI,
        own_columns=(*_PAIR, "gold_label"),
        tsv_labels=_MNLI,
        files=(("train", "train.tsv"), *_IN_MNLI),
    ),
    GlueTask("qnli", "QNLI", ("question", "sentence"), _RTE, tsv_labels=_RTE),
    GlueTask("rte", "RTE", _PAIR, _RTE, tsv_labels=_RTE),
)
TASKS: dict[str, GlueTask] = {task.name: task for task in _ALL}


def metric_names(splits: Collection[str], metrics: Collection[str]) -> list[str]:
    """What results call them; those of several splits carry the split's suffix: f1, accuracy_matched."""
    return [f"{name}{split.removeprefix('validation')}" for split in splits for name in metrics]
