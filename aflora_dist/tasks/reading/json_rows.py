"""JSON lines, and JSON files that hold one list. Types are the file's own: text stays text, numbers stay numbers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import AFLoRAError
from ...untrusted import refuse_deep_json
from .json_list import BLANK, list_elements, text_begins_with
from .json_values import as_json_column
from .lines import LINE, in_pieces, shown, text_lines

_WANTED = "Wanted is an object in each line, or one list of objects (pandas: to_json(orient='records'))."
_NAMES = {str: "text", bool: "true or false", int: "a number", float: "a number"}
_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), dict: pa.string()}


def read_json(path: Path, wanted: Collection[str]) -> tuple[list[str], Iterator[pa.Table]]:
    """The names of all columns; and piece by piece the values of the wanted ones, behind a column of lines, see `Rows`.

    A column is of text, whole numbers, floats, booleans, or of any JSON values, where lists or objects are among them.
    What a row lacks is null; whole numbers among floats are floats, but not within lists and objects. The file is read
    twice, for what a column is all of its values decide.

    Raises:
        AFLoRAError: No JSON; a key that an object has twice; a value of another kind than those of other rows. With
            the line.
    """
    columns: dict[str, None] = {}
    firsts: dict[str, dict[type, tuple[int, Any]]] = {name: {} for name in wanted}  # kind -> line, value
    empty = True
    for line, row in _objects(path):
        empty = False
        columns.update(dict.fromkeys(row))
        for name, first in firsts.items():
            if (value := row.get(name)) is not None:
                first.setdefault(type(value), (line, value))
    if empty:
        raise AFLoRAError(f"{path} is empty. {_WANTED}")
    return list(columns), _pieces(path, {name: _kind(path, name, firsts[name]) for name in columns if name in firsts})


def _pieces(path: Path, kinds: Mapping[str, type]) -> Iterator[pa.Table]:
    """The rows' values, of these kinds (dict: any JSON values)."""

    def written() -> Iterator[tuple[int, list[Any]]]:
        for line, row in _objects(path):
            yield line, [_written(path, line, name, row.get(name), kind) for name, kind in kinds.items()]

    for lines, columns in in_pieces(written()):
        arrays = {LINE: pa.array(lines, pa.int64())}
        for (name, kind), values in zip(kinds.items(), columns, strict=True):
            array = _converted(path, name, lines, values, _TYPES[kind])
            arrays[name] = as_json_column(array) if kind is dict else array
        yield pa.table(arrays)


def _written(path: Path, line: int, name: str, value: Any, kind: type) -> Any:
    """A value as its column holds it; as JSON text beside lists and objects, which takes less memory than these."""
    if kind is not dict or value is None:
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise AFLoRAError(f"{path}, line {line}, column {name!r}: a number in it is not finite.") from None


def _kind(path: Path, name: str, firsts: Mapping[type, tuple[int, Any]]) -> type:
    """The least common kind of a column's values; dict: any."""
    if list in firsts or dict in firsts:
        return dict
    (first, *others) = firsts or [str]
    for other in others:
        if _NAMES[other] != _NAMES[first]:
            line, value = firsts[other]
            raise AFLoRAError(
                f"{path}, line {line}, column {name!r}: {_NAMES[other]} ({shown(str(value))}), where line "
                f"{firsts[first][0]} has {_NAMES[first]}. A column holds values of one kind."
            )
    return float if float in firsts else first


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in json_rows(path):
        if not isinstance(row, dict):
            raise AFLoRAError(f"{path}, line {line}: {shown(json.dumps(row))} is not an object. {_WANTED}")
        yield line, row


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of JSON lines, or of a list: the line in which it begins, and the value."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    if text_begins_with(path, "["):
        yield from list_elements(path, decoder)
        return
    for line, text in enumerate(text_lines(path), start=1):
        if text.strip(BLANK):
            try:
                refuse_deep_json(text)
                value = decoder.decode(text)
            except ValueError as error:
                raise AFLoRAError(f"{path}, line {line}: no JSON: {_reason(error)} {_WANTED}") from None
            yield line, value


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


def _converted(path: Path, name: str, lines: Sequence[int], values: Sequence[Any], kind: pa.DataType) -> pa.Array:
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
