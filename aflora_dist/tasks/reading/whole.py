"""A file's rows one by one, each with all that it holds, for whoever writes them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .delimited import delimited_rows
from .json_rows import json_rows


def whole_rows(path: Path, plain: bool = False) -> Iterator[list[str] | dict[str, Any]]:
    """The rows of a file that `read_table` takes, in its order; `plain` as there.

    Returns:
        Of CSV and TSV the cells, in the header's order; of others the values by their names.
    """
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = delimited_rows(path, plain)
        next(rows)
        yield from (cells for _, cells in rows)
    elif path.suffix.lower() == ".parquet":
        with path.open("rb") as file, pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=10_000):
                yield from batch.to_pylist()
    else:
        yield from (value for _, value in json_rows(path))
