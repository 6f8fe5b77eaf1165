"""JSON lines, and JSON files that hold one list. Types are the file's own: text stays text, numbers stay numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import AFLoRAError
from ...untrusted import refuse_deep_json
from .json_values import as_json_column
from .lines import LINE, shown, text_lines

_BLANK = " \t\r\n"
_MARK = re.compile(rf"[{_BLANK}]*(\[[{_BLANK}]*\]|[\[,\]]?)[{_BLANK}]*")  # between the elements of a list
_WANTED = "Wanted is an object in each line, or one list of objects (pandas: to_json(orient='records'))."
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number"}
_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


class _JSONText(str):
    """That of a list or an object: less memory than its values."""


def read_json(path: Path, wanted: Collection[str]) -> tuple[list[str], pa.Table]:
    """The names of all columns; and of the wanted ones the values, behind a column of lines, see `Rows`.

    A column is of text, whole numbers, floats, booleans, or of any JSON values, where lists or objects are among them.
    What a row lacks is null; whole numbers among floats are floats, but not within lists and objects.

    Raises:
        AFLoRAError: No JSON; a key that an object has twice; a value of another kind than those of other rows. With
            the line.
    """
    lines: list[int] = []
    columns: dict[str, None] = {}
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    for line, row in json_rows(path):
        if not isinstance(row, dict):
            raise AFLoRAError(f"{path}, line {line}: {shown(json.dumps(row))} is not an object. {_WANTED}")
        columns.update(dict.fromkeys(row))
        lines.append(line)
        for name, column in values.items():
            value = row.get(name)
            if isinstance(value, list | dict):
                try:
                    value = _JSONText(json.dumps(value, ensure_ascii=False, allow_nan=False))
                except ValueError:
                    said = f"{path}, line {line}, column {name!r}: a number in it is not finite."
                    raise AFLoRAError(said) from None
            column.append(value)
    if not lines:
        raise AFLoRAError(f"{path} is empty. {_WANTED}")
    arrays = {name: _array(path, name, lines, values[name]) for name in columns if name in values}
    return list(columns), pa.table({LINE: pa.array(lines, pa.int64()), **arrays})


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, or of a list: the line in which it begins, and the value."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    begun = False
    for line, text in enumerate(text_lines(path), start=1):
        body = text.strip(_BLANK)
        if not begun and body.startswith("["):
            yield from _elements(path, decoder)
            return
        if body:
            begun = True
            try:
                refuse_deep_json(text)
                value = decoder.decode(text)
            except ValueError as error:
                raise AFLoRAError(f"{path}, line {line}: no JSON: {_reason(error)} {_WANTED}") from None
            yield line, value


def _elements(path: Path, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Those of a file's one list."""
    text, place, line, expected = "".join(text_lines(path)), 0, 1, "["
    while True:
        mark = _MARK.match(text, place)
        assert mark is not None
        line, place = line + mark[0].count("\n"), mark.end()
        if mark[1].endswith("]"):
            break
        if mark[1] != expected:
            found = shown(text[mark.start(1) :][:20]) if mark.end() < len(text) else "the end of the file"
            raise AFLoRAError(f"{path}, line {line}: no JSON: {found} instead of a comma or ] in its list.")
        try:
            value, end = _decoded(decoder, text, place)
        except ValueError as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise AFLoRAError(f"{path}, line {at}: no JSON: {_reason(error)}") from None
        yield line, value
        line, place, expected = line + text.count("\n", place, end), end, ","
    if place < len(text):
        raise AFLoRAError(f"{path}, line {line}: {shown(text[place : place + 20])} after the end of its list.")


def _decoded(decoder: json.JSONDecoder, text: str, place: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    try:
        value, end = decoder.raw_decode(text, place)
    except RecursionError:  # too deep for Python's stack, too
        refuse_deep_json(text, place)
        raise
    refuse_deep_json(text, place, end)
    return value, end


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.colno})."
    return f"{str(error).split(';')[0]}."


def _array(path: Path, name: str, lines: list[int], values: list[Any]) -> pa.Array | pa.ChunkedArray:
    """A column; the least common type of its values."""
    firsts: dict[type, int] = {}  # kind -> the first row that has one
    for row, value in enumerate(values):
        if value is not None:
            firsts.setdefault(type(value), row)
    if _JSONText in firsts:
        texts = [v if v is None or isinstance(v, _JSONText) else json.dumps(v, ensure_ascii=False) for v in values]
        return as_json_column(_converted(path, name, lines, texts, pa.string()))
    (first, *others) = firsts or [str]
    for other in others:
        if _KINDS[other] != _KINDS[first]:
            raise AFLoRAError(
                f"{path}, line {lines[firsts[other]]}, column {name!r}: {_KINDS[other]} "
                f"({shown(str(values[firsts[other]]))}), where line {lines[firsts[first]]} has {_KINDS[first]}. A "
                f"column holds values of one kind."
            )
    return _converted(path, name, lines, values, _TYPES[float if float in firsts else first])


def _converted(path: Path, name: str, lines: list[int], values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (ValueError, OverflowError):
        for line, value in zip(lines, values, strict=True):
            try:
                pa.array([value], kind)
            except (ValueError, OverflowError) as error:
                text = isinstance(error, UnicodeEncodeError)
                reason = "holds half of a surrogate pair" if text else "is too large. Write it as text"
                raise AFLoRAError(f"{path}, line {line}, column {name!r}: {shown(str(value))} {reason}.") from None
        raise
