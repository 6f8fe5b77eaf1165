"""What a reader makes of a file, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Found:
    """A file's rows.

    Attributes:
        columns: The names of all of its columns.
        values: The columns that were wanted; those that the file lacks are missing.
        lines: int64, (rows,): the line in which a row begins; in parquet, which has no lines, its number from 1.
    """

    columns: list[str]
    values: dict[str, pa.Array | pa.ChunkedArray]
    lines: pa.Array
