"""Parquet. Types are the file's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import AFLoRAError
from ...untrusted import reading
from .json_values import as_usual
from .lines import LINE

_ROWS = 10_000  # that are held at once
_ANEW = "Write it anew, as parquet."


def read_parquet(path: Path, wanted: Collection[str]) -> tuple[list[str], Iterator[pa.Table]]:
    """The names of all columns; and piece by piece the wanted ones, behind a column of row numbers, see `Rows`.

    Types are the file's, but for `as_usual`; categories are what they stand for.

    Raises:
        AFLoRAError: It is no parquet file, or a broken one.
    """
    with reading(path, _ANEW), path.open("rb") as file, pq.ParquetFile(file) as opened:
        columns, labels = opened.schema_arrow.names, _labels(opened.schema_arrow, wanted)
    for name in wanted:
        if columns.count(name) > 1:
            raise AFLoRAError(f"{path} has {columns.count(name)} columns of the name {name!r}.")
    return columns, _pieces(path, [name for name in columns if name in wanted], labels)


def _labels(schema: pa.Schema, wanted: Collection[str]) -> dict[bytes, bytes]:
    """The names of classes that the library datasets has written beside their numbers, as it reads them."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    features = datasets.Features.from_arrow_schema(schema)
    kept = {n: kind for n, kind in features.items() if n in wanted and isinstance(kind, datasets.ClassLabel)}
    return dict(datasets.Features(kept).arrow_schema.metadata)


def _pieces(path: Path, wanted: list[str], labels: dict[bytes, bytes]) -> Iterator[pa.Table]:
    rows = 0
    with reading(path, _ANEW), path.open("rb") as file, pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(_ROWS, columns=wanted):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)  # or bytes that are not UTF-8 would be found later, one by one
            chosen = [name for name in table.column_names if name in wanted]  # not what a.b may stand for, too
            values = {name: _of_known_type(path, name, table.column(name)) for name in chosen}
            lines = pa.array(range(rows + 1, rows + len(batch) + 1), pa.int64())
            rows += len(batch)
            yield pa.table({LINE: lines, **values}).replace_schema_metadata(labels)


def _of_known_type(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As a type that the library datasets knows."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _of_known_type(path, name, column.cast(kind.value_type))
    try:
        if (usual := as_usual(column)).type != kind:
            return usual
        datasets.Dataset(datasets.table.InMemoryTable(pa.table({name: column.slice(0, 1)})))[:]
    except Exception as error:
        raise AFLoRAError(
            f"{path}, column {name!r}: its type {kind} is not known here. Write it as another."
        ) from error
    return column
