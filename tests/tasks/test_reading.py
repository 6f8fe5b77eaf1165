"""Files of examples: what is read is what was written, or the line is named where it cannot be told."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aflora_dist import AFLoRAError
from aflora_dist.tasks.reading import json_list, parquet, read_table, table
from aflora_dist.tasks.reading import lines as lines_of
from tests.launch import ROOT, launch

WANTED = ("text", "label")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "aflora"


def rows(path: Path | str, wanted: tuple[str, ...] = WANTED) -> list[tuple[Any, ...]]:
    """A file's rows, their wanted columns in the order of `wanted`."""
    found = read_table(str(path), wanted)
    return list(zip(*(found.rows[name][:] for name in wanted), strict=True))


def written(folder: Path, suffix: str, content: str | bytes) -> Path:
    path = folder / f"file.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LONG = "x" * 150_000
READ: dict[str, tuple[str, str | bytes, list[tuple[Any, ...]]]] = {
    "cells are text": (
        "csv",
        "text,label\nNA,012\n007,True\n1e5,1e5\n,null\n",
        [("NA", "012"), ("007", "True"), ("1e5", "1e5"), ("", "null")],
    ),
    "quotes": ("csv", 'text,label\n"a, ""b""\nc",1\n"",2\n"d",""\n', [('a, "b"\nc', "1"), ("", "2"), ("d", "")]),
    "mark at the start": ("csv", b"\xef\xbb\xbftext,label\na,1\n", [("a", "1")]),
    "lines that end in CR LF": ("csv", 'text,label\r\na,1\r\n"b\r\nc",2\r\n', [("a", "1"), ("b\r\nc", "2")]),
    "lines of both ends": ("csv", "text,label\r\na,1\nb,2\r\n", [("a", "1"), ("b", "2")]),
    "no end of the last line": ("csv", "text,label\na,1\nb,2", [("a", "1"), ("b", "2")]),
    "blank lines": ("csv", "\ntext,label\n\na,1\n\r\nb,2\n\n", [("a", "1"), ("b", "2")]),
    "long cells": ("csv", f"text,label\n{LONG},1\n", [(LONG, "1")]),
    "pandas' index": ("csv", ",text,label\n0,a,1\n1,b,2\n", [("a", "1"), ("b", "2")]),
    "other columns twice": ("csv", "label,x,x,text\n1,,,a\n", [("a", "1")]),
    "other separators of lines in texts": ("csv", "text,label\na\u2028b\x85c\x0bd,1\n", [("a\u2028b\x85c\x0bd", "1")]),
    "blanks are kept": ("csv", "text,label\n a , 1\n", [(" a ", " 1")]),
    "quotes within": ("tsv", 'text\tlabel\na "b" c\tpos\ne"\tneg\n', [('a "b" c', "pos"), ('e"', "neg")]),
    "pandas' quotes, of all texts": (
        "tsv",
        '"text"\t"label"\n"a ""b"""\t"pos"\n"c\td"\t"neg"\n"e\nf"\t1\n',
        [('a "b"', "pos"), ("c\td", "neg"), ("e\nf", "1")],
    ),
    "R's quotes": ("tsv", '"text"\t"label"\n"a"\t1\n"b\nc"\t2\n', [("a", "1"), ("b\nc", "2")]),
    "a quote within an unquoted cell": ("csv", 'text,label\nb "c",2\n', [('b "c"', "2")]),
    "long cells between tabs": ("tsv", f"text\tlabel\n{LONG}\t1\n", [(LONG, "1")]),
    "lines": ("jsonl", '{"text": "a", "label": 1}\n\n{"label": 2, "text": "b", "x": [1, "y"]}', [("a", 1), ("b", 2)]),
    "lines of CR LF": ("json", b'\xef\xbb\xbf{"text": "a", "label": 1}\r\n', [("a", 1)]),
    "one list": ("json", '\n[{"text": "a",\n "label": 1}\n, {"text": "b", "label": 2}]\n', [("a", 1), ("b", 2)]),
    "one line": ("jsonl", '[{"text": "a", "label": 1}, {"text": "b", "label": 2}]', [("a", 1), ("b", 2)]),
    "separators in texts": ("jsonl", '{"text": "a\u2028b\x85", "label": 1}\n', [("a\u2028b\x85", 1)]),
    "missing keys": ("jsonl", '{"text": "a"}\n{"label": 2, "text": null}\n', [("a", None), (None, 2)]),
    "whole numbers among floats": (
        "jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "label": 0.5}\n',
        [("a", 1.0), ("b", 0.5)],
    ),
    "other columns of all kinds": (
        "jsonl",
        '{"text": "a", "label": 1, "x": 1}\n{"text": "b", "label": 2, "x": {"y": 1e999}}\n',
        [("a", 1), ("b", 2)],
    ),
    "nested values of many kinds": (
        "jsonl",
        '{"text": [{"a": 1}], "label": 1}\n{"text": [{"a": "x"}, 2], "label": 2}\n{"text": "b", "label": 3}',
        [([{"a": 1}], 1), ([{"a": "x"}, 2], 2), ("b", 3)],
    ),
    "a number of more than 64 bits within": (
        "jsonl",
        '{"text": [1], "label": 1}\n{"text": [1180591620717411303424, 0.1234567890123], "label": 2}',
        [([1], 1), ([1180591620717411303424, 0.1234567890123], 2)],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read_is_what_was_written(case: str, tmp_path: Path) -> None:
    suffix, content, expected = READ[case]
    path = written(tmp_path, suffix, content)
    assert rows(path) == expected
    assert rows(path) == expected  # as kept


def parquet_bytes() -> bytes:
    pq.write_table(pa.table({"text": ["a"]}), sink := io.BytesIO())
    return sink.getvalue()


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "one field more": ("csv", "text,label\na,1\nb, c,2\n", r"line 3: 3 fields, expected 2\. A cell that holds a"),
    "one field fewer": ("csv", 'text,label\n"a\nb",1\nc\n', r"line 4: 1 fields, expected 2"),
    "a comma at the end": ("csv", "text,label\na,1,\n", r"line 2: 3 fields, expected 2\..* none ends a line"),
    "an unclosed quote": ("csv", 'text,label\n"a,1\nb,2\n', r"lines 2 to 3: a quote is out of place"),
    "text behind a quote": ("csv", 'text,label\na,1\n"b" c,2\n', r"line 3: a quote is out of place"),
    "a column twice": ("csv", "text,label,text\na,1,b\n", r"line 1: the header names column 'text' 2 times"),
    "bare carriage returns": ("csv", "text,label\ra,1\rb,2\r", r"line 1: a carriage return without a line feed"),
    "a bare carriage return": ("csv", "text,label\na\rb,1\n", r"line 2: a carriage return without a line feed"),
    "another in a TSV": ("tsv", "text\tlabel\na\rb\t1\n", r"line 2: a carriage return without a line feed"),
    "a NUL": ("csv", b"text,label\na,1\nb\0,2\n", r"line 3: it holds a NUL"),
    "Latin 1": ("csv", "text,label\na,1\ncaf\u00e9,2\n".encode("latin-1"), r"line 3: byte 4 \(0xe9\) is not UTF-8"),
    "UTF-16": ("csv", "text,label\na,1\n".encode("utf-16"), r"is UTF-16 .*Save it as UTF-8"),
    "UTF-16 of the other order": ("tsv", "\ufefftext\tlabel\n".encode("utf-16-be"), r"is UTF-16 .*Save it as UTF-8"),
    "UTF-16 without a mark": ("csv", "text,label\n".encode("utf-16-le"), r"line 1: it holds a NUL"),
    "packed": ("csv", gzip.compress(b"text,label\na,1\n"), r"is compressed by gzip\. Unpack it first"),
    "UTF-32": ("csv", "text,label\na,1\n".encode("utf-32"), r"is UTF-32 .*Save it as UTF-8"),
    "UTF-32 of the other order": ("csv", "\ufefftext\n".encode("utf-32-be"), r"is UTF-32 .*Save it as UTF-8"),
    "bzip2": ("csv", bz2.compress(b"text,label\na,1\n"), r"is compressed by bzip2\. Unpack it first"),
    "xz": ("jsonl", lzma.compress(b"text,label\na,1\n"), r"is compressed by xz\. Unpack it first"),
    "zstd": ("csv", pa.Codec("zstd").compress(b"text,label\na,1\n", asbytes=True), r"is compressed by zstd\. Unpack"),
    "an old workbook": (
        "csv",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0",
        r"is a workbook, or another file of Office\. Save",
    ),
    "a PDF": ("csv", b"%PDF-1.7\n%\xe2\xe3", r"is a PDF\. Save its text"),
    "parquet of another name": ("csv", parquet_bytes(), r"is parquet\. Name it \.parquet"),
    "a blank line in one column": ("csv", "text\na\n\nb\n\n", r"line 3: whether this blank line is a row without text"),
    "a blank line in one quoted": ("tsv", '"text"\n"a"\n\n"b"\n', r"line 3: whether this blank line is a row"),
    "a blank line in a TSV": ("tsv", "text\na\n\r\n\r\nb\n", r"line 3: whether this blank line is a row"),
    "a workbook": ("csv", b"PK\x03\x04\x14\0\0\0", r"is a zip archive, or a workbook"),
    "semicolons": ("csv", 'text;label\n"a, b";1\n', r"line 1: 'text;label' is one name, .* by commas in \.csv\. Save "),
    "tabs in a CSV": (
        "csv",
        "text\tlabel\na\t1\n",
        r"line 1: .* is one name, .* Save it with commas, or name it \.tsv",
    ),
    "commas in a TSV": ("tsv", "text,label\na,1\n", r"line 1: 'text,label' is one name, .* by tabs in \.tsv\."),
    "two files in one": (
        "csv",
        "text,label\na,1\ntext,label\nb,2\n",
        r"line 3: the header again, as between two files",
    ),
    "two with marks": ("csv", b"\xef\xbb\xbftext,label\na,1\n" * 2, r"line 3: the header again"),
    "two TSVs in one": ("tsv", "text\tlabel\na\t1\ntext\tlabel\n", r"line 3: the header again"),
    "a pointer": (
        "parquet",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        r"is only Git LFS's pointer to the file\. Get the file: git lfs pull",
    ),
    "a page": ("csv", "\n<!DOCTYPE html>\n<html>", r"is a web page\. Download the file itself"),
    "commas between lines": (
        "jsonl",
        '{"text": "a"},\n{"text": "b"}\n',
        r"line 1: no JSON: .* Wanted is an object in each",
    ),
    "nothing": ("csv", "", r"is empty\. Its first line has to name the columns"),
    "nothing but a mark": ("tsv", b"\xef\xbb\xbf", r"is empty"),
    "a header only": ("csv", "text,label\n", r"is empty: it names columns, but has no rows"),
    "a lone quote": (
        "tsv",
        'text\tlabel\na\tpos\n"b\tneg\n',
        r"line 3: whether the quote at the start of '\"b' is text",
    ),
    "a sentence in quotes": ("tsv", 'text\tlabel\n"a, b"\tpos\n', r"line 2: whether the quote .* Save the file as CSV"),
    "rows between quotes": ("tsv", 'text\tlabel\n"a\tpos\nb\tneg\nc"\tpos\nd\tneg\n', r"line 2: whether the quote"),
    "fields in a TSV": ("tsv", "text\tlabel\na\tb\tpos\n", r"line 2: 3 fields, expected 2"),
    "a broken line": ("jsonl", '{"text": "a"}\n{"text": "b\n{"text": "c"}\n', r"line 2: no JSON: .*\(character 12\)"),
    "two objects in a line": ("jsonl", '{"text": "a"} {"text": "b"}\n', r"line 1: no JSON: Extra data"),
    "a key twice": (
        "jsonl",
        '{"text": "a"}\n{"text": "b", "text": "c"}\n',
        r"line 2: no JSON: the key 'text' is there tw",
    ),
    "a key twice in the only line": (
        "json",
        '{"text": "a", "text": "b"}',
        r"line 1: no JSON: the key 'text' is there tw",
    ),
    "no object": ("jsonl", '{"text": "a"}\n["b"]\n', r"line 2: .*is not an object"),
    "null": ("jsonl", "null\n", r"line 1: 'null' is not an object"),
    "one object": ("json", '{\n "text": ["a"]\n}\n', r"line 1: no JSON: .*Wanted is an object in each"),
    "kinds": (
        "jsonl",
        '{"label": "a"}\n{"label": 1}\n',
        r"line 2, column 'label': a number \('1'\), where line 1 has text",
    ),
    "other kinds": ("jsonl", '{"label": true}\n{"label": 1}\n', r"line 2, column 'label': a number .* true or false"),
    "a number of 70 bits": (
        "jsonl",
        '{"label": 1}\n{"label": 1180591620717411303424}',
        r"line 2, column 'label': .*too lar",
    ),
    "a longer one": ("jsonl", '{"label": 1}\n{"label": ' + "1" * 5000 + "}", r"line 2: no JSON: Exceeds the limit"),
    "half a character": (
        "jsonl",
        '{"text": "a"}\n{"text": "\\ud800"}\n',
        r"line 2, column 'text': .*half of a surrogate",
    ),
    "not finite within": ("jsonl", '{"text": [NaN]}\n', r"line 1, column 'text': a number in it is not finite"),
    "too deep": ("jsonl", '{"text": ' + "[" * 100_000, r"line 1: no JSON: nested too deeply"),
    "deep within": (
        "jsonl",
        '{"text": "a"}\n{"text": ' + "[" * 50 + "]" * 50 + "}",
        r"line 2: no JSON: nested too deeply",
    ),
    "too deep in a list": ("json", '[{"text": "a"},\n{"text": ' + "[" * 100_000, r"line 2: no JSON: nested too deeply"),
    "deep within a list": ("json", '[{"text": ' + "[" * 50 + "]" * 50 + "}]", r"line 1: no JSON: nested too deeply"),
    "an unclosed list": (
        "json",
        '[{"text": "a"},\n{"text": "b"}\n',
        r"line 3: no JSON: the end of the file instead of a com",
    ),
    "a list with a comma too many": ("json", '[{"text": "a"},\n]', r"line 2: no JSON: "),
    "a list and more": ("json", '[{"text": "a"}]\n[{"text": "b"}]', r"line 2: '\[\{.* after the end of its list"),
    "an element that is no object": ("json", '[{"text": "a"},\n\n"b"]', r"line 3: .*is not an object"),
    "an empty list": ("json", "[]", r"is empty"),
    "a NUL in JSON": ("jsonl", b'{"text": "a"}\n{"text": "\0"}\n', r"line 2: it holds a NUL"),
    "no parquet": ("parquet", "text,label\na,1\n", r"cannot be read: .*Write it anew, as parquet"),
    "empty parquet": ("parquet", "", r"cannot be read: "),
    "another kind": ("txt", "text\n", r"unknown kind of file '\.txt'; use one of \.csv, \.tsv"),
    "another packed one": ("csv.gz", "", r"is compressed\. Unpack it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    suffix, content, expected = REFUSED[case]
    path = written(tmp_path, suffix, content)
    with pytest.raises(AFLoRAError, match=expected) as refused:
        read_table(str(path), WANTED)
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value)) - len(str(path)) < 300
    assert "\n" not in str(refused.value)


def test_blank_lines_at_the_end_of_one_column_are_no_rows(tmp_path: Path) -> None:
    assert rows(written(tmp_path, "csv", '\ntext\na\n""\nb\n\n\n'), ("text",)) == [("a",), ("",), ("b",)]


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    for suffix, content, lines in (
        ("csv", '\ntext,label\n"a\n\nb",1\n\nc,2\n', [3, 7]),
        ("tsv", "text\tlabel\n\na\t1\nb\t2\n", [3, 4]),
        ("jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n', [2, 4]),
        ("json", '[\n{"text":\n"a"}, {"text": "b"},\n\n{"text": "c"}]\n', [2, 3, 5]),
    ):
        found = read_table(str(written(tmp_path, suffix, content)), WANTED)
        assert found.lines.tolist() == lines
        assert found.where(1).endswith(f"file.{suffix}, line {lines[1]}")


def test_parquet_is_read_in_its_own_types(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "category": pa.array(["b", None, "a"]).dictionary_encode(),
        "large": pa.array(["x", "y\0", "z"], pa.large_string()),
        "view": pa.array(["x", "y", "z"], pa.string_view()),
        "half": pa.array([0.5, 1.5, None], pa.float16()),
        "whole": pa.array([1, 2, 2**63], pa.uint64()),
        "date": pa.array([datetime.date(2021, 1, day) for day in (1, 2, 3)]),
        "time": pa.array([datetime.datetime(2021, 1, day) for day in (1, 2, 3)], pa.timestamp("ns", "UTC")),
        "decimal": pa.array([decimal.Decimal("1.50")] * 3),
        "bytes": pa.array([b"\xff", b"", None]),
        "list": pa.array([[{"role": "user", "content": "x"}], [], None]),
        "a.b": pa.array([1, 2, 3]),
        "nothing": pa.nulls(3),
    }
    pq.write_table(pa.table(columns), tmp_path / "file.parquet")
    found = read_table(str(tmp_path / "file.parquet"), list(columns))
    assert found.columns == list(columns)
    for name, column in columns.items():
        if name != "time":
            assert found.rows[name][:] == column.to_pylist(), name
    assert found.where(2).endswith("file.parquet, row 3")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "file.parquet").read_bytes()[:-20])
    with pytest.raises(AFLoRAError, match=r"broken\.parquet cannot be read"):
        read_table(str(tmp_path / "broken.parquet"), WANTED)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "latin.parquet")
    with pytest.raises(AFLoRAError, match=r"latin\.parquet cannot be read: .*UTF"):
        read_table(str(tmp_path / "latin.parquet"), WANTED)


def test_the_names_of_classes_that_datasets_writes_into_parquet_are_kept(tmp_path: Path, cache: Path) -> None:
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = [{"text": "a", "label": 1, "other": 0}, {"text": "b", "label": 0, "other": 1}]
    written = datasets.Dataset.from_list(rows, features=datasets.Features({**kinds, "other": datasets.Value("int8")}))
    written.to_parquet(str(tmp_path / "labels.parquet"))
    for _ in range(2):  # as read, and as kept
        found = read_table(str(tmp_path / "labels.parquet"), WANTED).rows
        assert found.features == datasets.Features(kinds)
        assert found[:] == {"text": ["a", "b"], "label": [1, 0]}


def big(path: Path, characters: int) -> None:
    """Rows of a thousand characters; a list of JSON all in one line."""
    rows = [{"text": f"{i} " + "x" * 1000, "label": "a"} for i in range(characters // 1000)]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    else:
        path.write_text("text,label\n" + "".join(f"{row['text']},a\n" for row in rows))


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_no_more_of_a_file_is_held_than_a_piece(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's objects and Arrow's, while 8 million characters are read in pieces of half a million."""
    big(tmp_path / f"big.{suffix}", 8_000_000)
    monkeypatch.setattr(json_list, "_PIECE", 100_000)
    monkeypatch.setattr(lines_of, "_CHARACTERS", 500_000)
    monkeypatch.setattr(parquet, "_ROWS", 500)
    before, arrow, rows = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for piece in table.read_rows(tmp_path / f"big.{suffix}", WANTED):
        arrow, rows = max(arrow, pa.total_allocated_bytes() - before), rows + len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 8_000
    assert arrow + peak < 5_000_000


def test_what_is_no_utf_8_in_a_long_line_is_told_with_its_byte(tmp_path: Path) -> None:
    """Behind many pieces of the line, of which some end within a character."""
    text = ('["' + "\u00e9\u20ac" * 700_000).encode() + b"\xff"
    (tmp_path / "list.json").write_bytes(b"\n" + text)
    with pytest.raises(AFLoRAError, match=rf"list\.json, line 2: byte {len(text)} \(0xff\) is not UTF-8"):
        read_table(str(tmp_path / "list.json"), WANTED)


def test_a_list_in_one_long_line_is_refused_at_its_character(tmp_path: Path) -> None:
    text = "[" + '{"text": "a"}, ' * 100_000 + '{"text" "b"}]'
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    said = rf"list\.json, line 1: no JSON: Expecting ':' delimiter \(character {expected.value.colno}\)\."
    with pytest.raises(AFLoRAError, match=said):
        read_table(str(tmp_path / "list.json"), WANTED)


@pytest.mark.parametrize("name", ["a[12].csv", "a*.csv", "a?.csv", "with blank.CSV", "{1}.csv", "%41.csv", "a#b.csv"])
def test_a_path_is_taken_as_it_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a1.csv").write_text("text,label\nwrong,0\n")
    (tmp_path / name).write_text("text,label\nright,1\n")
    assert rows(tmp_path / name) == [("right", "1")]
    monkeypatch.chdir(tmp_path)
    assert rows(name) == [("right", "1")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows(f"~/{name}") == [("right", "1")]


def test_what_is_no_file_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, said in (
        (str(tmp_path / "nowhere.csv"), "There is no file .*nowhere.csv"),
        (str(tmp_path / "folder.csv"), "folder.csv is a folder"),
        ("https://example.org/a.csv", "is an address. Download it"),
        ("", "is a folder"),
        ("~nobody-of-this-name/a.csv", "There is no file"),
        ("a\0b.csv", "There is no file"),
    ):
        with pytest.raises(AFLoRAError, match=said):
            read_table(name, WANTED)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "csv", "text,label\na,1\n")

    def no(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", no)
    with pytest.raises(AFLoRAError, match=r"file.csv could not be read: Permission denied\."):
        read_table(str(path), WANTED)


def test_a_file_is_read_once_and_anew_when_it_has_changed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(table, "read_rows", lambda *args, read=table.read_rows: calls.append(args) or read(*args))
    path = written(tmp_path, "csv", "text,label\na,1\n")
    time = path.stat().st_mtime_ns
    assert rows(path) == rows(path) == [("a", "1")]
    assert len(calls) == 1
    path.write_text("text,label\nb,1\n")  # as long, and as old
    os.utime(path, ns=(time, time))
    assert rows(path) == [("b", "1")]
    path.rename(tmp_path / "other.csv")
    assert rows(tmp_path / "other.csv") == [("b", "1")]
    assert len(calls) == 2
    assert rows(tmp_path / "other.csv", ("label", "text")) == [("1", "b")]
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_or_impossible_cache_is_told_and_goes_unused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "csv", "text,label\na,1\n")
    rows(path)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert rows(path) == [("a", "1")]
    assert f"The rows of {path} are not kept: {kept} cannot be used" in capsys.readouterr().err
    kept.unlink()
    cache.rmdir()
    cache.write_text("no folder")
    assert rows(path) == [("a", "1")]
    assert "Every process makes them for itself" in capsys.readouterr().err


@pytest.mark.distributed
def test_one_process_reads_and_all_have_the_rows_or_the_reason(tmp_path: Path) -> None:
    written(tmp_path, "csv", "text,label\na,1\nb,2\n")
    written(tmp_path, "tsv", "text\tlabel\na\n")
    done = launch("ddp", 2, str(ROOT / "tests" / "workers" / "reading.py"), str(tmp_path), timeout=120)
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    refused = f"{tmp_path / 'file.tsv'}, line 2: 1 fields, expected 2."
    assert said == [f"rank 0 read 1, has ['a', 'b'], then {refused}", f"rank 1 read 0, has ['a', 'b'], then {refused}"]


def test_pandas_own_files_of_every_quoting(tmp_path: Path) -> None:
    texts = ['a "b" c', "d\te", "f\ng", "h, i", "", "NA", '"', '""j""', " k ", "'l'", "m\r\nn", "\u00e9\U0001f600"]
    frame = pd.DataFrame({"text": texts, "label": [f"{i:03}" for i in range(len(texts))]})
    expected = list(frame.itertuples(index=False, name=None))
    for quoting in (0, 1, 2):
        for end in ("\n", "\r\n"):
            for suffix, sep in (("csv", ","), ("tsv", "\t"))[: 2 if quoting else 1]:
                path = tmp_path / f"{quoting}.{suffix}"
                frame.to_csv(path, sep=sep, index=quoting == 1, quoting=quoting, lineterminator=end)
                assert rows(path) == expected, (quoting, end, suffix)
    for lines in (True, False):
        frame.to_json(tmp_path / "file.json", orient="records", lines=lines)
        assert rows(tmp_path / "file.json") == expected
    frame.to_parquet(tmp_path / "file.parquet")
    assert rows(tmp_path / "file.parquet") == expected
    (tmp_path / "indented.json").write_text(json.dumps(frame.to_dict("records"), indent=1))
    assert rows(tmp_path / "indented.json") == expected
