"""Lists and objects of a row, kept as JSON text, so that no row is given the keys or the types of another.

An Arrow column of structs has one type for all rows: a row gets the keys of the others as nulls, 1 beside 1.5 becomes
1.0, and {} cannot be told from {"b": null}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

_TEXT = pa.json_(pa.string())
_PIECE = 10_000  # rows that are held as Python values at once


@dataclass
class Exact(datasets.Json):
    """JSON values as the standard library reads them; the library datasets rounds every third float."""

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        return None if value is None else json.loads(value)


def as_json_column(texts: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of JSON texts as one of the values that they stand for."""
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    return pa.chunked_array([pa.ExtensionArray.from_storage(_TEXT, chunk) for chunk in chunks], _TEXT)


def told_apart(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of lists and structs as one of JSON values. A null in a struct is a key that is not there.

    (Most are of keys that other rows have; one that was written cannot be told from these.) But a turn of a chat has a
    content, which is null where it calls tools alone: templates ask for that. A TypeError for what JSON cannot hold.
    """
    pieces = [pa.array([], pa.string())]
    for start in range(0, len(column), _PIECE):
        values = column.slice(start, _PIECE).to_pylist()
        texts = [None if value is None else json.dumps(_without_nulls(value), ensure_ascii=False) for value in values]
        pieces.append(pa.array(texts, pa.string()))
    return as_json_column(pa.chunked_array(pieces))


def as_usual(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as it would be in other files: pandas writes large_string, and whole numbers have many sizes.

    Lists and structs are any JSON values; a TypeError for what JSON cannot hold.
    """
    kind = column.type
    if pa.types.is_nested(kind):
        return told_apart(column)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    fits = pa.types.is_integer(kind) and not pa.types.is_uint64(kind)
    return column.cast(pa.int64()) if fits else column


def exact(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, whose JSON values are read exactly."""
    features = {name: Exact() if isinstance(kind, datasets.Json) else kind for name, kind in rows.features.items()}
    return datasets.Dataset(rows.data, info=datasets.DatasetInfo(features=datasets.Features(features)))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {"content"} if "role" in value else set()
        return {key: _without_nulls(part) for key, part in value.items() if part is not None or key in kept}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
