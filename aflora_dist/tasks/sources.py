"""Rows from anywhere, for every task: files, data sets of the hub or laid out as there, and several of these."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..errors import AFLoRAError, one_line
from ..options import DataConfig
from ..processes import first_on_node
from .reading import FILES, Rows, as_usual, exact, listed, read_table

HELD_OUT = ("validation", "valid", "dev", "test")
_TO_EVALUATE = (
    "{where} has no examples for evaluation: name data.validation_file, or data.validation_split of a data set, or say "
    "with data.hold_out how many of its {rows:,} examples shall serve as such."
)


def training_rows(config: DataConfig, wanted: Collection[str]) -> list[tuple[Rows, float]]:
    """What is trained on: tables, and how often an epoch has each one's examples. A collective.

    Args:
        wanted: The columns to read, as they are understood.

    Raises:
        AFLoRAError: On every rank: one cannot be had, or lacks a column that data.columns names.
    """
    if (config.name is None) == (config.train_file is None):
        raise AFLoRAError(
            f"data.task={config.task} needs data.train_file (JSON lines, JSON, parquet, CSV or TSV) or data.name (a "
            f"data set of the hub, or a folder that lies as one does there), one of the two."
        )
    if config.name is not None:
        name, subset = config.name, config.subset
        first = _hub_rows(name, subset, config.revision, config.train_split, config, wanted, "train_split")
    else:
        assert config.train_file is not None
        first = _file_rows(config.train_file, config, wanted)
    found = [(first, 1.0)]
    for source, weight in config.mix.items():
        if source.lower().endswith(FILES):
            rows = _file_rows(source, config, wanted)
        else:
            name, subset, split = _parted(source)
            # data.train_split is of data.name, and may be a part of it.
            split = split or (config.train_split if name == config.name else "train")
            rows = _hub_rows(name, subset or None, None, split, config, wanted, "mix")
        if config.revision is None and Path(rows.name).resolve() == Path(first.name).resolve():
            found[0] = (first, 1 + weight)  # once, for a row that is held out would be trained on by the other name
        else:
            found.append((rows, weight))
    for column, source in config.columns.items():
        if not any(column in table.columns for table, _ in found):
            raise first.lacks(source)
    return found


def refuse_unknown_columns(config: DataConfig, tables: Sequence[Rows | None]) -> None:
    """Raise an AFLoRAError where data.columns names a column that no table has."""
    there = [table for table in tables if table is not None]
    for source in config.columns.values():
        if not any(source in table.header for table in there):
            raise there[0].lacks(source)


def _trained_splits(config: DataConfig) -> set[str]:
    """The splits of data.name of which something is trained on, in the mix, too."""
    mixed = [_parted(source) for source in config.mix if not source.lower().endswith(FILES)]
    own = [
        s or config.train_split for n, subset, s in mixed if _same(n, config.name) and subset == (config.subset or "")
    ]
    parts = [part for split in (config.train_split, *own) for part in split.split("+")]
    return {part.partition("[")[0].strip() for part in parts}


def _parted(source: str) -> list[str]:
    """NAME, SUBSET and SPLIT of a data set in the mix; what is not named is empty."""
    return [*source.split(":", 2), "", ""][:3]


def _same(one: str, other: str | None) -> bool:
    """Whether both name the same file or data set."""
    if other is None or one == other:
        return one == other
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def _overlap(one: str, other: str) -> bool:
    """Whether two splits share examples for certain: of parts of the same split nobody knows without its length."""
    parts = [[part.strip() for part in split.split("+") if part] for split in (one, other)]
    return any(
        a == b or (a.split("[")[0] == b.split("[")[0] and ("[" not in a or "[" not in b))
        for a in parts[0]
        for b in parts[1]
    )


def _refuse_trained(config: DataConfig) -> None:
    """Raise where what is measured with is in the mix that is trained on."""
    for source in config.mix:
        name, subset, split = _parted(source)
        same = _same(name, config.name) and subset == (config.subset or "")
        if _same(source, config.validation_file) or (same and _overlap(split, config.validation_split or "")):
            raise AFLoRAError(
                f"data.mix trains on {source}, on which data.{'validation_split' if split else 'validation_file'} "
                f"measures: leave it out of one of the two."
            )


def trained_too(config: DataConfig) -> bool:
    """Whether what is measured with is trained on, for certain."""
    if config.hold_out:
        return False
    if config.validation_file is not None:
        return _same(config.validation_file, config.train_file)
    return config.validation_split is not None and _overlap(config.train_split, config.validation_split)


def evaluation_rows(config: DataConfig, wanted: Collection[str]) -> Rows | None:
    """What is measured with, likewise; None: there is nothing of its own. A collective."""
    _refuse_trained(config)
    if config.validation_file is not None:
        return _file_rows(config.validation_file, config, wanted)
    if config.name is None or (config.hold_out and config.validation_split is None):
        return None
    split = config.validation_split
    return _hub_rows(config.name, config.subset, config.revision, split, config, wanted, "validation_split")


def split_off(
    config: DataConfig,
    train: datasets.Dataset,
    parts: Sequence[tuple[int, float]],
    held: datasets.Dataset | None,
    seed: int,
    where: str,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What to train on, and what to measure with: data.hold_out of the former, where it is said.

    What is trained on has the rows of each part as often as its weight says, none of which is held out; of what is left
    of a weight, as many as that are drawn.

    Args:
        parts: How many rows each has, and its weight.

    Raises:
        AFLoRAError: There is neither that nor something of its own.
    """
    kept = np.arange(len(train))
    if held is None or config.hold_out:
        if not 0 < config.hold_out < len(train):
            few = f"data.hold_out={config.hold_out} leaves nothing to train on: {where} has {len(train):,} examples."
            raise AFLoRAError(few if config.hold_out else _TO_EVALUATE.format(where=where, rows=len(train)))
        places = datasets.Dataset.from_dict({"place": kept}).train_test_split(test_size=config.hold_out, seed=seed)
        held, kept = train.select(places["test"]["place"][:]), np.asarray(places["train"]["place"][:])
        if len(parts) > 1:
            kept = _unheld(train, kept, np.asarray(places["test"]["place"][:]), [rows for rows, _ in parts])
    chosen = _weighted(kept, parts, seed)
    return train if np.array_equal(chosen, np.arange(len(train))) else train.select(chosen), held


def _unheld(train: datasets.Dataset, kept: np.ndarray, held: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The places that are kept, but for rows that are held out of another part: it may be the same set again."""

    def told(places: np.ndarray) -> Iterator[tuple[str, int]]:
        part_of = np.searchsorted(np.cumsum(sizes), places, side="right")
        contents = (json.dumps(row, sort_keys=True, default=str) for row in train.select(places))
        return zip(contents, part_of.tolist(), strict=True)

    parts_of: dict[str, set[int]] = {}
    for content, part in told(held):
        parts_of.setdefault(content, set()).add(part)
    return kept[[not parts_of.get(content, set()) - {part} for content, part in told(kept)]]


def _weighted(kept: np.ndarray, parts: Sequence[tuple[int, float]], seed: int) -> np.ndarray:
    """The places of rows, as often as the weight of the part that they are of says."""
    if all(weight == 1 for _, weight in parts):
        return kept
    chance, start, chosen = np.random.default_rng(seed), 0, []
    for rows, weight in parts:
        whole, some = divmod(weight, 1)
        places = kept[(start <= kept) & (kept < start + rows)]
        chosen += [places] * int(whole) + [np.sort(chance.choice(places, round(some * len(places)), replace=False))]
        if not (whole and len(places)) and not len(chosen[-1]):
            raise AFLoRAError(
                f"data.mix: weight {weight:g} of {len(places):,} examples ({rows:,} less those held out) is none. Give "
                f"more weight, or leave them out."
            )
        start += rows
    return np.concatenate(chosen)


def at_most(number: int | None, dataset: datasets.Dataset, seed: int | None = None) -> datasets.Dataset:
    """So many of the examples: the first ones, or with a seed some that are drawn; None: all, in their order."""
    if number is None:
        return dataset
    drawn = dataset if seed is None else dataset.shuffle(seed=seed)
    return drawn.select(range(min(number, len(drawn))))


def load_from_hub(name: str, subset: str | None, revision: str | None, otherwise: str) -> Any:
    """A data set of the hub, or a folder that lies as one does there: split name -> dataset. A collective.

    Args:
        otherwise: What to do without a network.

    Raises:
        AFLoRAError: On every rank: it cannot be had; with its subsets, where it wants one of them.
    """

    def load() -> Any:
        try:
            return datasets.load_dataset(name, subset, revision=revision)
        except Exception as error:  # offline, a proxy, the hub's own errors
            if (subsets := _subsets(name, revision)) and subset not in subsets:
                asked = "has several subsets" if subset is None else f"has no subset {subset!r}"
                raise AFLoRAError(f"The data set {name!r} {asked}. data.subset is one of: {listed(subsets)}.") from None
            if "scripts are no longer supported" in str(error):
                raise AFLoRAError(
                    f"The data set {name!r} is a script, and none is run. The hub has most of these as parquet, too: "
                    f"data.revision=refs/convert/parquet."
                ) from None
            raise AFLoRAError(
                f"The data set {' '.join(filter(None, (name, subset)))!r} could not be loaded from the hub "
                f"({one_line(error)}). Without a network, {otherwise}."
            ) from error

    return first_on_node(load)


def _subsets(name: str, revision: str | None) -> list[str]:
    try:
        return datasets.get_dataset_config_names(name, revision=revision)
    except Exception:
        return []


def _file_rows(name: str, config: DataConfig, wanted: Collection[str]) -> Rows:
    return read_table(name, {*wanted, *config.columns.values()}).renamed(config.columns)


def _hub_rows(
    name: str,
    subset: str | None,
    revision: str | None,
    split: str | None,
    config: DataConfig,
    wanted: Collection[str],
    option: str,
) -> Any:
    """None where no split is named, by `option`, and there is none of those that are usual and not trained on."""
    loaded = load_from_hub(
        name, subset, revision, "give a folder that holds the data set, or use data.train_file and data.validation_file"
    )
    if split is None:
        trained = _trained_splits(config)
        split = next((usual for usual in HELD_OUT if usual in loaded and usual not in trained), None)
        if split is None:
            return None
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        places = instruction.to_absolute({part: len(rows) for part, rows in loaded.items()})
    except Exception:
        names = f"{name}:{subset or ''}:SPLIT in data.mix" if option == "mix" else f"data.{option}"
        raise AFLoRAError(
            f"The data set {name!r} has no split named {split}; it has: {', '.join(loaded)}. {names} names one, "
            f"or a part of it, as {next(iter(loaded))}[:90%]."
        ) from None
    ends = [len(loaded[at.splitname]) if at.to is None else at.to for at in places]
    parts = [loaded[at.splitname].select(range(at.from_ or 0, end)) for at, end in zip(places, ends, strict=True)]
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(rows) == 0:
        raise AFLoRAError(f"The split {split} of the data set {name!r} is empty.")
    found = Rows(
        name=f"{name} ({', '.join(filter(None, (subset, split)))})",
        columns=rows.column_names,
        rows=_each_as_itself(rows, {*wanted, *config.columns.values()}),
        untyped=False,
        lines=np.arange(1, len(rows) + 1),
    )
    return found.renamed(config.columns)


def _each_as_itself(dataset: datasets.Dataset, wanted: Collection[str]) -> datasets.Dataset:
    """The wanted columns of the hub's rows, without the keys that others of the same Arrow table have."""
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    others = [f.name for f in dataset.data.schema if as_usual(pa.chunked_array([], f.type)).type != f.type]

    def tell(table: pa.Table) -> pa.Table:
        return pa.table({n: as_usual(table.column(n)) if n in others else table.column(n) for n in table.column_names})

    if others:
        arrow = dataset.with_format("arrow")
        dataset = first_on_node(lambda: arrow.map(tell, batched=True)).with_format(None)
    return exact(dataset)
