"""A file is read once on each node, into a file that all its ranks map into memory; later runs find it there."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from accelerate.state import PartialState

from ...errors import AFLoRAError, one_line
from ...processes import first_on_node
from ..tokens import cache_folder
from .delimited import read_csv, read_tsv
from .found import Found
from .json_rows import read_json
from .json_values import exact
from .lines import listed
from .parquet import read_parquet

_READERS: dict[str, Callable[[Path, Collection[str]], Found]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
}
_VERSION = 3  # of what the readers make of a file: raise it when that changes
# What was downloaded in place of a file.
_STANDS_FOR = {
    b"version https://git-lfs.github.com/": "only Git LFS's pointer to the file. Get the file: git lfs pull",
    b"<!doctype html": "a web page. Download the file itself",
    b"<html": "a web page. Download the file itself",
}
_LINE = "\n"  # no column that anybody wants


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        name: What errors call it: the file's path.
        columns: The names of all of its columns.
        rows: The columns that were wanted; those that the file lacks are missing.
        untyped: Its values are cells of text, whatever they stand for.
        lines: int64, (rows,): the line in which a row begins; in parquet, which has no lines, its number from 1.
    """

    name: str
    columns: list[str]
    rows: datasets.Dataset
    untyped: bool
    lines: np.ndarray

    def where(self, row: int) -> str:
        """For errors: the file and the line of a row, counted from 0."""
        return f"{self.name}, {'row' if self.name.lower().endswith('.parquet') else 'line'} {self.lines[row]}"

    def lacks(self, column: str) -> AFLoRAError:
        """The error that says so, with the columns that it has."""
        near = next((name for name in self.columns if _plain(name) == _plain(column)), None)
        hint = f" {near!r} is written otherwise." if near is not None else ""
        return AFLoRAError(f"{self.name} has no column {column!r}; its columns are: {listed(self.columns)}.{hint}")

    def type(self, column: str) -> pa.DataType:
        """A column's type."""
        return self.rows.data.column(column).type

    def first_null(self, column: str) -> int | None:
        """The first row that has nothing in a column."""
        place: int = self.rows.data.column(column).is_null().index(True).as_py()
        return None if place < 0 else place


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_table(name: str, wanted: Collection[str]) -> Table:
    """Columns of a CSV, TSV, JSON (lines) or parquet file. A collective.

    Args:
        name: The file's path, taken as it is written, but for ~.
        wanted: The columns to read, where the file has them. Others may hold what they will.

    Raises:
        AFLoRAError: On every rank: it is not there, cannot be read, or holds no row; with the line.
    """

    def load() -> Table:
        path = _existing(name)
        try:
            return _kept(path, wanted)
        except OSError as error:
            raise AFLoRAError(f"{path} could not be read: {error.strerror or error}.") from None

    return first_on_node(load)


def read(path: Path, wanted: Collection[str]) -> pa.Table:
    """As it is kept: the wanted columns and the lines, and the names of all columns as metadata.

    Raises:
        AFLoRAError: It cannot be read, or holds no row.
    """
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _STANDS_FOR.items():
        if start.startswith(beginning):
            raise AFLoRAError(f"{path} is {kind}.")
    found = _READERS[path.suffix.lower()](path, wanted)
    if len(found.lines) == 0:
        raise AFLoRAError(f"{path} is empty: it names columns, but has no rows.")
    table = pa.table({_LINE: found.lines, **found.values})
    return table.replace_schema_metadata({"columns": json.dumps(found.columns)})


def _plain(name: str) -> str:
    return "".join(character for character in name if character.isprintable()).strip().casefold()


def _existing(name: str) -> Path:
    if "://" in name:
        raise AFLoRAError(f"{name} is an address. Download it, and name the file.")
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        raise AFLoRAError(f"{path} is a folder. Name the file in it.")
    if not os.path.isfile(path):
        raise AFLoRAError(f"There is no file {path}.")
    if path.suffix.lower() in (".gz", ".zip", ".bz2", ".xz", ".zst"):
        raise AFLoRAError(f"{path} is compressed. Unpack it first.")
    if path.suffix.lower() not in _READERS:
        raise AFLoRAError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(_READERS)}.")
    return path


def _kept(path: Path, wanted: Collection[str]) -> Table:
    with path.open("rb") as file:  # a file that was changed is another one, whatever its name and time
        content = hashlib.file_digest(file, "sha256").hexdigest()
    settings = json.dumps([_VERSION, content, path.suffix.lower(), sorted(wanted)])
    kept = cache_folder() / f"{hashlib.sha256(settings.encode()).hexdigest()[:40]}.arrow"
    table = None if kept.exists() else read(path, wanted)
    try:
        if table is not None:
            _write(table, kept)
        with pa.memory_map(str(kept)) as source, pa.ipc.open_stream(source) as stream:
            metadata = stream.schema.metadata
        rows = datasets.Dataset.from_file(str(kept))
    except (OSError, ValueError) as error:  # read-only, full, or damaged: Arrow's errors are of both kinds
        if PartialState().is_local_main_process:
            reason = getattr(error, "strerror", None) or one_line(error)
            print(
                f"{kept} cannot be used ({reason}): every process reads {path} for itself. HF_DATASETS_CACHE names "
                f"another folder.",
                file=sys.stderr,
                flush=True,
            )
        table = read(path, wanted) if table is None else table
        metadata, rows = table.schema.metadata, datasets.Dataset(datasets.table.InMemoryTable(table))
    return Table(
        name=str(path),
        columns=json.loads(metadata[b"columns"]),
        rows=exact(rows).remove_columns(_LINE),
        untyped=path.suffix.lower() in (".csv", ".tsv"),
        lines=rows.data.column(_LINE).to_numpy(),
    )


def _write(table: pa.Table, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=kept.parent) as folder:
        made = Path(folder) / kept.name
        with pa.OSFile(str(made), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=10_000)
        made.replace(kept)  # who has mapped the one that was there keeps it
