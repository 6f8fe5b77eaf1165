"""JSON lines, and JSON files that hold one list. Types are the file's own: text stays text, numbers stay numbers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ... import nested
from ...errors import AFLoRAError
from .found import Found
from .json_values import as_text
from .lines import shown, text_lines

_BLANK = " \t\r\n"
_WANTED = "Wanted is an object in each line, or one list of objects (pandas: to_json(orient='records'))."
_SCALARS = {str: "text", bool: "true or false", int: "a number", float: "a number"}
_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


class _Nested(str):
    """The JSON text of a list or an object: less memory than its values."""


def read_json(path: Path, wanted: Collection[str]) -> Found:
    """Columns of text, whole numbers, floats, booleans, or of any JSON values, where lists or objects are among them.

    What a row lacks is null; whole numbers among floats are floats, but not within lists and objects.

    Raises:
        AFLoRAError: No JSON; a key that an object has twice; a value of another kind than those of other rows. With
            the line.
    """
    lines: list[int] = []
    columns: dict[str, None] = {}
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    for line, row in _rows(path):
        if not isinstance(row, dict):
            raise AFLoRAError(f"{path}, line {line}: {shown(json.dumps(row))} is not an object. {_WANTED}")
        columns.update(dict.fromkeys(row))
        lines.append(line)
        for name, column in values.items():
            value = row.get(name)
            column.append(
                _text(value, f"{path}, line {line}, column {name!r}") if isinstance(value, list | dict) else value
            )
    if not lines:
        raise AFLoRAError(f"{path} is empty. {_WANTED}")
    arrays = {name: _array(path, name, lines, values[name]) for name in columns if name in values}
    return Found(list(columns), arrays, pa.array(lines, pa.int64()))


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line in which it begins, value)"""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    begun = False
    for line, text in enumerate(text_lines(path), start=1):
        body = text.strip(_BLANK)
        if not body:
            continue
        if not begun and body.startswith("["):
            yield from _elements(path, decoder)
            return
        begun = True
        try:
            nested.refuse_deep_json(text)
            value = decoder.decode(text)
        except (ValueError, RecursionError) as error:
            whole = isinstance(error, json.JSONDecodeError) and _is_one_object(path)
            reason = f"one object over several lines. {_WANTED}" if whole else f"no JSON: {_reason(error)} {_WANTED}"
            raise AFLoRAError(f"{path}, line {line}: {reason}") from None
        yield line, value


def _elements(path: Path, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Those of a file's one list."""
    text = "".join(text_lines(path))
    place, line, counted = text.index("[") + 1, 1, 0

    def skip_blanks(place: int) -> int:
        nonlocal line, counted
        while place < len(text) and text[place] in _BLANK:
            place += 1
        line, counted = line + text.count("\n", counted, place), place
        return place

    place = skip_blanks(place)
    if text[place : place + 1] == "]":
        end = place + 1
    else:
        while True:
            try:
                value, end = _decoded(decoder, text, place)
            except ValueError as error:
                at = error.lineno if isinstance(error, json.JSONDecodeError) else line
                raise AFLoRAError(f"{path}, line {at}: no JSON: {_reason(error)}") from None
            yield line, value
            place = skip_blanks(end)
            end = place + 1
            if text[place:end] == "]":
                break
            if text[place:end] != ",":
                found = shown(text[place : place + 20]) if text[place:end] else "the end of the file"
                raise AFLoRAError(f"{path}, line {line}: no JSON: {found} instead of a comma or ] in its list.")
            place = skip_blanks(end)
    end = skip_blanks(end)
    if end < len(text):
        raise AFLoRAError(f"{path}, line {line}: {shown(text[end : end + 20])} after the end of its list.")


def _decoded(decoder: json.JSONDecoder, text: str, place: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    try:
        value, end = decoder.raw_decode(text, place)
    except RecursionError:  # too deep for Python's stack, too
        nested.refuse_deep_json(text, place)
        raise
    nested.refuse_deep_json(text, place, end)
    return value, end


def _text(value: Any, where: str) -> _Nested:
    try:
        return _Nested(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise AFLoRAError(f"{where}: a number in it is not finite.") from None


def _is_one_object(path: Path) -> bool:
    try:
        return isinstance(nested.loads("".join(text_lines(path))), dict)
    except ValueError:
        return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.colno})."
    return f"{str(error).split(';')[0]}."


def _array(path: Path, name: str, lines: list[int], values: list[Any]) -> pa.Array | pa.ChunkedArray:
    kinds: dict[type, int] = {}  # kind -> index of the first of it
    for index, value in enumerate(values):
        if value is not None:
            kinds.setdefault(type(value), index)
    if _Nested in kinds:
        texts = [v if v is None or isinstance(v, _Nested) else json.dumps(v, ensure_ascii=False) for v in values]
        return as_text(_converted(path, name, lines, texts, pa.string()))
    (first, *others) = sorted(kinds, key=kinds.__getitem__) or [str]
    for other in others:
        if _SCALARS[other] != _SCALARS[first]:
            raise AFLoRAError(
                f"{path}, line {lines[kinds[other]]}, column {name!r}: {_SCALARS[other]} "
                f"({shown(str(values[kinds[other]]))}), where line {lines[kinds[first]]} has {_SCALARS[first]}. A "
                f"column holds values of one kind."
            )
    return _converted(path, name, lines, values, _TYPES[float if float in kinds else first])


def _converted(path: Path, name: str, lines: list[int], values: list[Any], kind: pa.DataType) -> Any:
    try:
        return pa.array(values, kind)
    except (ValueError, TypeError, OverflowError):
        for line, value in zip(lines, values, strict=True):
            try:
                pa.array([value], kind)
            except UnicodeEncodeError:
                raise AFLoRAError(
                    f"{path}, line {line}, column {name!r}: half of a surrogate pair (\\ud800 to \\udfff) is no text."
                ) from None
            except (ValueError, TypeError, OverflowError):
                raise AFLoRAError(
                    f"{path}, line {line}, column {name!r}: {shown(str(value))} is too large. Write it as text."
                ) from None
        raise
