"""All that a file holds comes back row for row, whatever its kind and that of the file that is written."""

from __future__ import annotations

import csv
import datetime
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.predict.output import Output
from aflora_dist.predict.partial import Partial
from aflora_dist.tasks.reading import read_table

AWKWARD = [
    'a "quoted" word',
    "two\nlines",
    "an old\rMac's",
    "a PC's\r\nline",
    "a, comma",
    "",
    " blanks ",
    "naïve ☃",
    "007",
    "1.10",
]
NEW = ["prediction", "probability_a"]


def predicted(count: int) -> list[list[Any]]:
    return [[f"class {row}", row / 8] for row in range(count)]


def written(file: Path, out: Path, values: list[list[Any]] | None = None) -> Path:
    table = read_table(str(file), set())
    values = predicted(len(table.lines)) if values is None else values

    def again() -> Iterator[list[Any]]:
        return iter(values)

    Output(file, out, overwrite=False).write(table.columns, NEW[: len(values[0])], again)
    assert not list(out.parent.glob(".*"))
    return out


def write_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(["text", "id", "id"])  # nobody wants id
        writer.writerows([text, place, "x"] for place, text in enumerate(AWKWARD))
    return path


def test_cells_of_csv_stay_as_they_are(tmp_path: Path) -> None:
    out = written(write_csv(tmp_path / "in.csv"), tmp_path / "out.csv")
    with out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["text", "id", "id", *NEW]
    assert rows == [[text, str(at), "x", f"class {at}", str(at / 8)] for at, text in enumerate(AWKWARD)]


def test_json_keeps_its_values_and_what_a_row_lacks(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "big": 2**70, "nested": {"b": [1, None, {"c": "é"}]}, "null": None},
        {"text": "b\nc", "other": True, "float": 0.1},
    ]
    (tmp_path / "in.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    new = [dict(zip(NEW, values, strict=True)) for values in predicted(2)]
    wanted = [row | more for row, more in zip(rows, new, strict=True)]
    out = written(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert [json.loads(line) for line in out.read_text().splitlines()] == wanted
    assert json.loads(written(tmp_path / "in.jsonl", tmp_path / "out.json").read_text()) == wanted
    back = written(tmp_path / "out.json", tmp_path / "cells.csv", [["again", 1.0]] * 2)
    with back.open(newline="") as file:
        found = list(csv.reader(file))
    assert json.loads(found[1][found[0].index("nested")]) == rows[0]["nested"]
    assert found[2][found[0].index("other")] == "true"
    assert found[2][found[0].index("nested")] == ""


def test_what_json_and_cells_cannot_hold_is_written_as_near_as_they_can(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "nan": [float("nan")], "bytes": [b"caf\xc3\xa9"], "list": [[1.0, float("inf")]]})
    pq.write_table(table, tmp_path / "in.parquet")
    (line,) = written(tmp_path / "in.parquet", tmp_path / "out.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found | dict.fromkeys(NEW) == {
        "text": "a",
        "nan": None,
        "bytes": "café",
        "list": [1.0, None],
    } | dict.fromkeys(NEW)
    with written(tmp_path / "in.parquet", tmp_path / "out.csv").open() as file:
        assert next(csv.DictReader(file))["bytes"] == "café"


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b", None], pa.large_string()),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "day": pa.array([datetime.date(2026, 1, day) for day in (1, 2, 3)]),
            "small": pa.array([1, 2, 3], pa.int8()),
            "list": pa.array([[1], [], None], pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    found = pq.read_table(written(tmp_path / "in.parquet", tmp_path / "out.parquet"))
    assert found.select(table.column_names).equals(table)
    assert found.column("prediction").to_pylist() == ["class 0", "class 1", "class 2"]
    assert found.column("probability_a").type == pa.float64()
    lines = written(tmp_path / "in.parquet", tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["day"] == "2026-01-02"
    assert json.loads(lines[0])["list"] == [1.0]


def test_a_tsv_is_quoted_where_it_was_or_has_to_be_and_can_be_read_again(tmp_path: Path) -> None:
    plain = tmp_path / "plain.tsv"
    plain.write_text('text\tid\na lone " quote\t1\nb, c\t2\n')
    out = written(plain, tmp_path / "out.tsv")
    assert out.read_text().splitlines()[1] == 'a lone " quote\t1\tclass 0\t0.0'
    spoken = written(plain, tmp_path / "spoken.tsv", [["two\nlines"], ["tab\there"]])
    for file, answers in ((out, ["class 0", "class 1"]), (spoken, ["two\nlines", "tab\there"])):
        rows = read_table(str(file), {"text", "prediction"}).rows
        assert rows["text"][:] == ['a lone " quote', "b, c"]
        assert rows["prediction"][:] == answers


def test_half_of_a_surrogate_pair_is_written_as_it_was_or_refused_at_first(tmp_path: Path) -> None:
    rows = [{"text": "a", "user": "\ud83d", "more": {"\udc00": ["\ud83d"]}}, {"text": "b", "\ud83d": 1}]
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    wanted = [row | {"prediction": f"class {at}", "probability_a": at / 8} for at, row in enumerate(rows)]
    out = written(file, tmp_path / "out.jsonl")
    assert [json.loads(line) for line in out.read_text().splitlines()] == wanted
    assert json.loads(written(file, tmp_path / "out.json").read_text()) == wanted
    with written(file, tmp_path / "out.csv").open(newline="") as cells:
        found = list(csv.DictReader(cells))
    assert found[0]["user"] == "\\ud83d"
    assert json.loads(found[0]["more"]) == rows[0]["more"]
    assert found[1]["\\ud83d"] == "1"
    output = Output(file, tmp_path / "new.jsonl", overwrite=False)
    with pytest.raises(AFLoRAError, match=r"'probability_\\ud83d', which is no text"):
        output.check(["text"], ["prediction", "probability_\ud83d"])


@pytest.mark.parametrize("value", ["\ud83d", 2**70, {}, {"a": "\ud83d"}])
def test_what_parquet_cannot_hold_is_refused_before_anything_is_predicted(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"text": "a", "odd": value}))
    Output(file, tmp_path / "out.jsonl", overwrite=False).check(["text", "odd"], NEW)
    Output(file, tmp_path / "out.parquet", overwrite=False).check(["text"], NEW)
    with pytest.raises(AFLoRAError, match=r"Column 'odd' .*\.jsonl"):
        Output(file, tmp_path / "out.parquet", overwrite=False).check(["text", "odd"], NEW)


def test_columns_that_parquet_cannot_hold_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "mixed": 1}\n{"text": "b", "mixed": "one"}\n')
    with pytest.raises(AFLoRAError, match=r"Column 'mixed' .*\.jsonl"):
        written(tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("links", [None, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_nothing_is_replaced_that_came_meanwhile_and_a_file_that_changed_is_noticed(
    links: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if links is not None:  # a mount without hard links
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(links, os.strerror(links))))
    file = write_csv(tmp_path / "in.csv")
    output = Output(file, tmp_path / "out.csv", overwrite=False)
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(AFLoRAError, match="could not be written"):
        output.write(["text", "id", "id"], NEW, lambda: iter(predicted(len(AWKWARD))))
    assert (tmp_path / "out.csv").read_text() == "mine"
    with pytest.raises(AFLoRAError, match="other rows now"):
        Output(file, tmp_path / "b.csv", overwrite=False).write(["text", "id", "id"], NEW, lambda: iter(predicted(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]
    assert len(read_table(str(written(file, tmp_path / "c.csv")), set()).lines) == len(AWKWARD)


def test_a_part_that_was_cut_is_left_out_and_two_do_not_write_at_once(tmp_path: Path) -> None:
    kept = Partial(tmp_path / "out.csv", "one")
    kept.append(predicted(3))
    kept.append([["line\nbreak", 0.5]])
    kept.close()
    path = tmp_path / ".out.csv.partial"
    for cut in (1, 5, 12):
        path.write_bytes(path.read_bytes()[:-cut])
        again = Partial(tmp_path / "out.csv", "one")
        assert again.rows == 3
        assert list(again.values()) == predicted(3)
        again.append([["line\nbreak", 0.5]])
        assert list(again.values())[3] == ["line\nbreak", 0.5]
        again.close()
    with pytest.raises(AFLoRAError, match="another prediction"):
        Partial(tmp_path / "out.csv", "two")
    again = Partial(tmp_path / "out.csv", "one")
    again.remove()
    again.close()
    assert not path.exists()
