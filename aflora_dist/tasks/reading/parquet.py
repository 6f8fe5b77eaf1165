"""Parquet. Types are the file's own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import AFLoRAError, one_line
from .json_values import told_apart
from .lines import LINE


def read_parquet(path: Path, wanted: Collection[str]) -> tuple[list[str], pa.Table]:
    """The names of all columns; and the wanted ones, behind a column of row numbers, see `Rows`.

    Types are the file's; categories are what they stand for, lists and structs any JSON values.

    Raises:
        AFLoRAError: It is no parquet file, or a broken one.
    """
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as opened:
            columns, rows = opened.schema_arrow.names, opened.metadata.num_rows
            for name in wanted:
                if columns.count(name) > 1:
                    raise AFLoRAError(f"{path} has {columns.count(name)} columns of the name {name!r}.")
            table = opened.read(columns=[name for name in columns if name in wanted])
            table.validate(full=True)  # or bytes that are not UTF-8 would be found later, one by one
            chosen = [name for name in table.column_names if name in wanted]  # not what a.b may stand for, too
            values = {name: _of_known_type(path, name, table.column(name)) for name in chosen}
    except AFLoRAError:
        raise
    except Exception as error:  # Arrow's errors are of many kinds
        reason = one_line(error)
        raise AFLoRAError(f"{path} could not be read as parquet: {reason.rstrip('.')}. Write it anew.") from None
    return columns, pa.table({LINE: pa.array(range(1, rows + 1), pa.int64()), **values})


def _of_known_type(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As a type that the library datasets knows."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _of_known_type(path, name, column.cast(kind.value_type))
    if pa.types.is_string_view(kind):
        return column.cast(pa.string())
    try:
        if pa.types.is_nested(kind):
            return told_apart(column)
        datasets.Dataset(datasets.table.InMemoryTable(pa.table({name: column.slice(0, 1)})))[:]
    except Exception as error:
        raise AFLoRAError(
            f"{path}, column {name!r}: its type {kind} is not known here. Write it as another."
        ) from error
    return column
