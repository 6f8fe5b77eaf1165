"""Anything may be in a file: what programs write is read as it was written, and all else is refused in a line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aflora_dist import AFLoRAError
from aflora_dist.tasks.labels import encode_labels
from aflora_dist.tasks.reading import exact, json_list, lines, parquet
from aflora_dist.tasks.reading.table import Rows, read_rows, read_table

# What separates, quotes and ends, more often than it would by chance.
ODD = st.sampled_from(
    ['"', '""', ",", "\t", "\n", "\r\n", " ", "'", "\\", "\ufeff", "\u2028", "\x85", "a", "1", "é", "😀"]
)
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")
TEXTS = st.lists(ODD | LETTERS, max_size=8).map("".join)
NAMES = st.lists(TEXTS.filter(bool), min_size=1, max_size=3, unique=True)
fuzzed = settings(
    max_examples=75, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def tables(draw: Any, cells: Any = TEXTS) -> dict[str, list[Any]]:
    names = draw(NAMES)
    row = st.tuples(*[cells] * len(names)).filter(lambda row: list(row) != names)  # or it would be another header
    rows = draw(st.lists(row, min_size=1, max_size=6))
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def columns(path: Path, wanted: dict[str, Any]) -> dict[str, list[Any]]:
    found = exact(datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(read_rows(path, wanted)))))
    return {name: found[name][:] for name in wanted}


def refused(action: Callable[[], Any]) -> str | None:
    """What is said where something is refused; any other exception is one of the test."""
    said = None
    try:
        action()
    except AFLoRAError as error:
        said = str(error)
    assert "\n" not in (said or "")
    return said


@contextmanager
def at_once(size: int, rows: int) -> Iterator[None]:
    """So many bytes of a file are held at once, and so many rows."""
    places = ((json_list, "_PIECE", size), (lines, "_ROWS", rows), (parquet, "_ROWS", rows))
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(mock.patch.object(*place))
        yield


@fuzzed
@given(table=tables(), quoting=st.sampled_from([0, 1, 2]), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans())
def test_csv_of_the_csv_module(table: dict[str, Any], quoting: Any, end: str, mark: bool, folder: Path) -> None:
    with (folder / "a.csv").open("w", encoding="utf-8-sig" if mark else "utf-8", newline="") as file:
        writer = csv.writer(file, quoting=quoting, lineterminator=end)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    if not mark and next(iter(table)).startswith("\ufeff"):
        return  # read as a mark, as every program does
    assert columns(folder / "a.csv", table) == table


@fuzzed
@given(table=tables(), quoting=st.sampled_from([0, 1, 2]), sep=st.sampled_from([",", "\t"]), index=st.booleans())
def test_csv_and_tsv_of_pandas(table: dict[str, Any], quoting: Any, sep: str, index: bool, folder: Path) -> None:
    path = folder / ("b.csv" if sep == "," else "b.tsv")
    pd.DataFrame(table).to_csv(path, sep=sep, quoting=quoting, index=index, encoding="utf-8-sig")
    found: dict[str, Any] = {}
    said = refused(lambda: found.update(columns(path, table)))
    if said is None:
        assert found == table
    else:  # where it cannot be told
        assert sep == "\t"
        assert quoting != 1
        assert "whether the quote at the start of" in said


@fuzzed
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_tsv_without_quoting(rows: list[tuple[str, str]], folder: Path) -> None:
    rows = [tuple(" ".join(cell.split()) for cell in row) for row in rows]  # type: ignore[misc]
    lines = ["text\tlabel", *("\t".join(row) for row in rows)]
    (folder / "c.tsv").write_text("\n".join(lines) + "\n")
    found: dict[str, Any] = {}
    said = refused(lambda: found.update(columns(folder / "c.tsv", {"text": None, "label": None})))
    assert (said is not None) == any(cell.startswith('"') for row in rows for cell in row)
    if said is None:
        assert found == {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
    else:
        assert "whether the quote at the start of" in said


SCALARS = TEXTS | st.none()
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | TEXTS
    | st.floats(-1e15, 1e15).map(lambda x: round(x, 3))
)
NESTED = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


@fuzzed
@given(
    table=st.one_of(
        *(tables(kind | st.none()) for kind in (TEXTS, st.booleans(), st.integers(-(2**63), 2**63 - 1))),
        tables(st.floats(allow_nan=False)),
        tables(st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=3)),
    ),
    style=st.sampled_from(["lines", "list", "indented", "escaped"]),
    size=st.sampled_from([1, 2, 5, 1000]),
)
def test_json_of_the_json_module(table: dict[str, Any], style: str, size: int, folder: Path) -> None:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    text = {
        "lines": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "list": json.dumps(rows, ensure_ascii=False),
        "indented": json.dumps(rows, indent=2),
        "escaped": "".join(json.dumps(row) + "\n" for row in rows),
    }[style]
    (folder / "d.json").write_text(text, newline="")
    with at_once(size, rows=2):
        assert columns(folder / "d.json", table) == table


@fuzzed
@given(values=st.lists(NESTED, min_size=1, max_size=5))
def test_json_of_any_values(values: list[Any], folder: Path) -> None:
    path = folder / "e.jsonl"
    path.write_text("".join(json.dumps({"x": value, "other": value}) + "\n" for value in values))
    found: dict[str, Any] = {}
    said = refused(lambda: found.update(columns(path, {"x": None})))
    if said is not None:
        assert "line" in said
        assert len({type(value) for value in values} - {type(None)}) > 1
    elif any(isinstance(value, list | dict) for value in values):
        assert json.dumps(found["x"]) == json.dumps(values)  # 1 is not 1.0, and no row has the keys of another
    else:
        assert found["x"] == values


@fuzzed
@given(
    table=st.one_of(
        *(
            tables(kind | st.none())
            for kind in (st.text(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.binary())
        ),
        tables(st.floats(allow_nan=False) | st.none()),
        tables(st.dates() | st.none()),
        tables(st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=3) | st.none()),
    )
)
def test_parquet_of_pyarrow(table: dict[str, Any], folder: Path) -> None:
    pq.write_table(pa.table(table), folder / "f.parquet")
    with at_once(1, rows=2):
        assert columns(folder / "f.parquet", table) == table


@fuzzed
@given(
    suffix=st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet"]),
    content=st.binary(max_size=60)
    | st.lists(ODD | st.sampled_from(["text", "[", "]", "{", "}", ":", "0"])).map("".join),
)
def test_any_bytes_are_read_or_refused(suffix: str, content: bytes | str, folder: Path) -> None:
    path = folder / f"g.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(lambda: list(read_rows(path, ["text", "a"])))
    for size in (1, 7):
        with at_once(size, size):
            assert refused(lambda: list(read_rows(path, ["text", "a"]))) == said


@fuzzed
@given(at=st.integers(0, 10_000), byte=st.binary(min_size=1, max_size=4), cut=st.integers(0, 600))
def test_broken_parquet_is_read_or_refused(at: int, byte: bytes, cut: int, folder: Path) -> None:
    made = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b", "c"] * 9, "label": list(range(27))}), made)
    content = bytearray(made.getvalue())
    content[at % len(content) : at % len(content) + len(byte)] = byte
    (folder / "h.parquet").write_bytes(content[: len(content) - (cut if cut < 60 else 0)])
    refused(lambda: list(read_rows(folder / "h.parquet", ["text", "label"])))


LABELS = st.sampled_from(
    ["0", "1", "2", "7", "01", "20240101", "-1", "+1", "1.0", "0.5", "1e5", ".5", "1,5", "50%", "nan", "NA", "inf", "",
     " ", "0.0", "pos\u200b", "\\N", "pos", "neg", "pos ", "True", "true", "1" * 30, "1e999", "\u0661", "_", "1_0",
     "0x1", "a,b", '"', "a\nb"]
)  # fmt: skip


@fuzzed
@given(
    train=st.lists(LABELS, min_size=1, max_size=6),
    validation=st.lists(LABELS, min_size=1, max_size=3),
    regression=st.sampled_from([None, True, False]),
)
def test_labels_are_told_apart_as_written_or_refused(
    train: list[str], validation: list[str], regression: bool | None
) -> None:
    files = {"train": train, "validation": validation}
    tables = {
        name: Rows(name, ["label"], datasets.Dataset.from_dict({"label": labels}), True, np.arange(len(labels)) + 2)
        for name, labels in files.items()
    }
    found: list[Any] = []
    if refused(lambda: found.append(encode_labels(tables, "label", regression))) is None:
        ((names, numbers),) = found
        for name, labels in files.items():
            if names is None:
                assert numbers[name] == [float(label) for label in labels]
                assert all(map(math.isfinite, numbers[name]))
            else:
                for number, label in zip(numbers[name], labels, strict=True):
                    assert names[number] == label or (regression is False and float(names[number]) == float(label))
                assert len(names) <= 2 * len({*train, *validation})


def test_the_cache_holds_what_was_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    values = [{"a": 1}, {"a": "x"}, [None, 0.5], "b", None]
    (folder / "i.jsonl").write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    for _ in range(2):
        assert read_table(str(folder / "i.jsonl"), ["x"]).rows["x"][:] == values
