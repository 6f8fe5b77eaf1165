"""A file is read once on each node, see `kept`, and all its ranks map its rows into memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ...errors import AFLoRAError
from ...processes import first_on_node
from ..kept import cache_folder, found_or_made, key, put_in_place
from .delimited import read_delimited
from .json_rows import read_json
from .json_values import exact
from .lines import LINE, listed, refuse_other_files, shown
from .parquet import read_parquet

_READERS: dict[str, Callable[[Path, Collection[str]], tuple[list[str], Iterator[pa.Table]]]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
}
FILES = tuple(_READERS)  # how the names of files end that are read
_WITH_LINES = (".csv", ".tsv", ".json", ".jsonl")


@dataclass(frozen=True)
class Rows:
    """A file's rows.

    Attributes:
        name: What errors call it: the file's path, or the data set with its subset and split.
        columns: The names of all of its columns.
        rows: The columns that were wanted; those that the file lacks are missing.
        untyped: Its values are cells of text, whatever they stand for.
        lines: int64, (rows,): the line in which a row begins; in parquet, which has no lines, its number from 1.
        parts: What it was joined of, if it was.
        header: The names of all of its columns as they stand in it, in their order, whatever stands for what.
    """

    name: str
    columns: list[str]
    rows: datasets.Dataset
    untyped: bool
    lines: np.ndarray
    parts: tuple[Rows, ...] = ()
    header: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "header", self.header or tuple(self.columns))

    def where(self, row: int) -> str:
        """For errors: the file and the line of a row, counted from 0."""
        for part in self.parts:
            if row < len(part.rows):
                return part.where(row)
            row -= len(part.rows)
        return f"{self.name}, {'line' if self.name.lower().endswith(_WITH_LINES) else 'row'} {self.lines[row]}"

    def renamed(self, columns: Mapping[str, str]) -> Rows:
        """With columns that stand for others.

        Args:
            columns: Name -> the column that is meant; those that are not there are passed over. Where one of these
                is not there, and all of the names are, it is those that are meant.
        """
        found = {name: other for name, other in columns.items() if other in self.columns}
        if not found or (len(found) < len(columns) and {*columns} <= {*self.columns}):
            return self
        kept = [name for name in self.rows.column_names if name not in found and name not in found.values()]
        pieces = [self.rows.select_columns([other]).rename_columns({other: name}) for name, other in found.items()]
        rows = datasets.concatenate_datasets([self.rows.select_columns(kept), *pieces] if kept else pieces, axis=1)
        names = [*(name for name in self.columns if name in kept or name not in columns.values()), *found]
        return replace(self, columns=list(dict.fromkeys(names)), rows=exact(rows))

    @classmethod
    def joined(cls, parts: Sequence[Rows], apart: str) -> Rows:
        """The rows of several, one after the other, with those columns that all of them have, which are texts.

        Args:
            apart: A column that the parts alone have, for it may be of different types in them.
        """
        if len(parts) == 1:
            return parts[0]
        name = " and ".join(part.name for part in parts)
        columns = [column for column in parts[0].columns if all(column in part.columns for part in parts)]
        shared = [c for c in columns if c != apart and all(c in part.rows.column_names for part in parts)]
        rows = datasets.concatenate_datasets([part.rows.select_columns(shared) for part in parts])
        untyped = all(part.untyped for part in parts)
        return cls(name, columns, exact(rows), untyped, np.concatenate([part.lines for part in parts]), tuple(parts))

    def lacks(self, column: str) -> AFLoRAError:
        """The error that says so, with the columns that it has."""
        near = next((name for name in self.header if _bare(name) == _bare(column)), None)
        hint = f" {near!r} is written otherwise." if near is not None else ""
        if column in self.header:
            hint = " data.columns has it stand for another one."
        return AFLoRAError(f"{self.name} has no column {column!r}; its columns are: {listed(self.header)}.{hint}")

    def type(self, column: str) -> pa.DataType:
        """A column's type."""
        return self.rows.data.column(column).type

    def is_text(self, column: str) -> bool:
        """Whether a column holds texts."""
        kind = self.type(column)
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def check_filled(self, column: str) -> None:
        """Raise an AFLoRAError if a row has nothing in a column."""
        place: int = self.rows.data.column(column).is_null().index(True).as_py()
        if place >= 0:
            raise AFLoRAError(f"{self.where(place)}: it has nothing in column {column!r}.")

    def check_text(self, column: str) -> None:
        """Raise an AFLoRAError if a row has something else than a text in a column."""
        self.check_filled(column)
        if not self.is_text(column):
            row, value = next((row, v) for row, v in enumerate(self.rows[column][:]) if not isinstance(v, str))
            columns = isinstance(value, list | dict) and len(self.rows) == 1
            hint = " Rows are wanted, and not columns (pandas: to_json(orient='records'))." if columns else ""
            said = shown(str(value))
            raise AFLoRAError(f"{self.where(row)}: it has {said} in column {column!r}, which is not text.{hint}")


def read_table(name: str, wanted: Collection[str], plain: bool = False) -> Rows:
    """Columns of a CSV, TSV, JSON (lines) or parquet file. A collective.

    Args:
        name: The file's path, taken as it is written, but for ~.
        wanted: The columns to read, where the file has them. Others may hold what they will.
        plain: It is a TSV in which a quote at the start of a cell is text, as in GLUE's.

    Raises:
        AFLoRAError: On every rank: it is not there, cannot be read, or holds no row; with the line.
    """

    def load() -> Rows:
        path = _existing(name)
        try:
            return _kept(path, wanted, plain)
        except OSError as error:
            raise AFLoRAError(f"{path} could not be read: {error.strerror or error}.") from None

    return first_on_node(load)


def read_rows(path: Path, wanted: Collection[str], plain: bool = False) -> Iterator[pa.Table]:
    """As they are kept, piece by piece: the lines, with the names of all columns as metadata, and the wanted columns.

    Raises:
        AFLoRAError: It cannot be read, or holds no row.
    """
    refuse_other_files(path)
    columns, pieces = read_delimited(path, wanted, plain) if plain else _READERS[path.suffix.lower()](path, wanted)
    empty = True
    for piece in pieces:
        lines = piece.schema.field(LINE).with_metadata({"columns": json.dumps(columns)})  # a table's own is overwritten
        yield piece.set_column(0, lines, piece.column(LINE))
        empty = False
    if empty:
        raise AFLoRAError(f"{path} is empty: it names columns, but has no rows.")


def _bare(name: str) -> str:
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
        raise AFLoRAError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(FILES)}.")
    return path


def _kept(path: Path, wanted: Collection[str], plain: bool) -> Rows:
    with path.open("rb") as file:  # a file that was changed is another one, whatever its name and time
        content = hashlib.file_digest(file, "sha256").hexdigest()
    kept = cache_folder() / f"{key(content, 'plain' if plain else path.suffix.lower(), sorted(wanted))}.arrow"

    def make(missing: list[Path], folder: Path) -> None:
        pieces = read_rows(path, wanted, plain)
        first = next(pieces)
        with pa.ipc.new_stream(str(folder / kept.name), first.schema) as stream:
            for piece in itertools.chain([first], pieces):
                stream.write_table(piece)
        put_in_place(folder / kept.name, kept)

    def make_in_memory() -> datasets.Dataset:
        return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(read_rows(path, wanted, plain))))

    rows = found_or_made(f"rows of {path}", {kept: None}, make, make_in_memory)
    return Rows(
        name=str(path),
        columns=json.loads(rows.data.schema.field(LINE).metadata[b"columns"]),
        rows=exact(rows).remove_columns(LINE),
        untyped=path.suffix.lower() in (".csv", ".tsv"),
        lines=rows.data.column(LINE).to_numpy(),
    )
