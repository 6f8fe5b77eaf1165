"""The rows of a file with what was predicted of them, in a file of the kind that its name ends in."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import AFLoRAError, one_line, writing
from ..store.typed import finite
from ..tasks.reading import is_plain, whole_rows
from .partial import Values

Row = list[str] | dict[str, Any]
_AT_ONCE = 10_000  # rows
_KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_ESCAPED = "backslashreplace"  # half of a surrogate pair: in JSON, \ud83d is what was read


class Output:
    """Where predictions go.

    Args:
        file: What is predicted.
        out: What is written; None: beside it, as NAME.predicted.csv.
        overwrite: Replace what is there.

    Attributes:
        path: What is written.
        plain: Of what is read, as `read_table` has it.

    Raises:
        AFLoRAError: `file` is a folder; `path` is there already, is the file that is read, is of no known kind, or its
            folder is missing.
    """

    def __init__(self, file: Path, out: Path | None, overwrite: bool) -> None:
        if file.is_dir():
            raise AFLoRAError(f"{file.absolute()} is a folder. Name the file in it that is to be predicted.")
        self.file, self.overwrite, self.plain = file, overwrite, False
        self.path = path = file.with_name(f"{file.stem}.predicted{file.suffix}") if out is None else out
        if path.suffix.lower() not in _KINDS:
            raise AFLoRAError(f"{path}: what kind of file is meant? Let its name end in {', '.join(_KINDS)}.")
        if path.is_dir():
            raise AFLoRAError(f"{path} is a folder. Name a file in it.")
        if path.exists() and file.exists() and path.samefile(file):
            raise AFLoRAError(f"{path} is the file that is read, which would be lost. Name another with --out.")
        if os.path.lexists(path) and not overwrite:  # a link that leads nowhere, too
            raise AFLoRAError(f"{path} is there already. Name another file with --out, or say --overwrite.")
        if not path.parent.is_dir():
            raise AFLoRAError(f"There is no folder {path.parent}. Make it, or name another file with --out.")

    def check(self, columns: Sequence[str], new: Sequence[str]) -> None:
        """Raise an AFLoRAError if the new columns cannot stand beside the file's, or these where they are written."""
        if odd := next((name for name in new if not _is_text(name)), None):
            raise AFLoRAError(f"A new column would be called {odd!r}, which is no text (half of a surrogate pair).")
        if twice := [name for name in new if new.count(name) > 1]:
            raise AFLoRAError(
                f"Several new columns would be called {twice[0]!r}, for as many classes have one name: name them apart "
                f"in id2label of the model's config.json."
            )
        if taken := [name for name in new if name in columns]:
            raise AFLoRAError(
                f"{self.file} has a column {taken[0]!r} already, as from a prediction before. Have the new ones called "
                f"otherwise: --prefix second_ makes it {'second_' + taken[0]!r}."
            )
        twice = [name for name in columns if columns.count(name) > 1]
        if twice and not {self.file.suffix.lower(), self.path.suffix.lower()} <= {".csv", ".tsv"}:
            raise AFLoRAError(
                f"{self.file}: the header names column {twice[0]!r} {columns.count(twice[0])} times, which "
                f"{self.path.suffix} cannot hold. Save it as CSV with other names."
            )
        if self.path.suffix.lower() == ".parquet" and self.file.suffix.lower() in (".json", ".jsonl"):
            _check_parquet(self.file, columns)

    def write(self, columns: Sequence[str], new: Sequence[str], values: Callable[[], Iterator[Values]]) -> None:
        """Write all rows, under another name until the last one is written.

        Args:
            columns: Those of the file.
            new: The names of what was predicted.
            values: Begins to give what was predicted, row by row.

        Raises:
            AFLoRAError: It cannot be written, or the file has changed meanwhile.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with writing("What was predicted", self.path, "Make room; the same command goes on from there."):
                if self.file.suffix.lower() == self.path.suffix.lower() == ".parquet":
                    _append_to_parquet(self.file, temporary, new, values())
                else:
                    self._write(temporary, columns, new, values)
                self._put_in_place(temporary)
        except ValueError as error:
            if "zip()" not in str(error):
                raise
            raise AFLoRAError(f"{self.file} has other rows now than when it was read. Start again.") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _write(
        self, path: Path, columns: Sequence[str], new: Sequence[str], values: Callable[[], Iterator[Values]]
    ) -> None:
        kind, rows = self.path.suffix.lower(), zip(whole_rows(self.file, self.plain), values(), strict=True)
        records = (_record(row, columns, new, of_row) for row, of_row in rows)
        if kind == ".parquet":
            held = list(records)
            arrays = {name: _arrow(name, [record.get(name) for record in held]) for name in (*columns, *new)}
            pq.write_table(pa.table(arrays), path)
            return
        with path.open("w", encoding="utf-8", errors=_ESCAPED, newline="") as file:
            if kind == ".csv":
                _write_cells(file, rows, columns, new, ",", csv.QUOTE_MINIMAL)
            elif kind == ".tsv":
                plain = self._plain(new, values)
                _write_cells(file, rows, columns, new, "\t", csv.QUOTE_NONE if plain else csv.QUOTE_ALL)
            else:
                _write_json(file, records, kind == ".json")
            file.flush()
            os.fsync(file.fileno())

    def _plain(self, new: Sequence[str], values: Callable[[], Iterator[Values]]) -> bool:
        """Whether cells can stand between tabs without quotes, as they did in the file."""
        suffixes = self.file.suffix.lower(), self.path.suffix.lower()
        if suffixes != (".tsv", ".tsv") or not is_plain(self.file):
            return False
        cells = (cell for row in (new, *values()) for cell in row if isinstance(cell, str))
        return not any(cell.startswith('"') or {"\t", "\n", "\r"} & {*cell} for cell in cells)

    def _put_in_place(self, temporary: Path) -> None:
        if not self.overwrite:
            try:
                os.link(temporary, self.path)  # unlike a rename, it replaces nothing that has come meanwhile
                return
            except FileExistsError:
                raise
            except (OSError, NotImplementedError):  # a file system without hard links
                self.path.open("x").close()  # raises FileExistsError, too
        temporary.replace(self.path)


def _is_text(value: str) -> bool:
    """Whether it can be written: JSON's \\ud83d alone stands for no character."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _text(value: Any) -> str:
    """A value as a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _json(value) if isinstance(value, list | dict) else _other(value)


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    return row if isinstance(row, list) else [_text(row.get(name)) for name in columns]


def _record(row: Row, columns: Sequence[str], new: Sequence[str], values: Values) -> dict[str, Any]:
    held = dict(zip(columns, row, strict=True)) if isinstance(row, list) else row
    return held | dict(zip(new, values, strict=True))


_Pairs = Iterable[tuple[Row, Values]]


def _write_cells(
    file: IO[str], rows: _Pairs, columns: Sequence[str], new: Sequence[str], delimiter: str, how: int
) -> None:
    quoting: dict[str, Any] = {"quoting": how} | ({"quotechar": None} if how == csv.QUOTE_NONE else {})
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", **quoting)
    # Before 3.13, csv leaves a carriage return without quotes, and whoever reads it sees a line's end.
    quoted = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    lines = ([*_cells(row, columns), *map(_text, values)] for row, values in rows)
    for cells in chain([[*columns, *new]], lines):
        (quoted if any("\r" in cell for cell in cells) else writer).writerow(cells)


def _write_json(file: IO[str], records: Iterable[dict[str, Any]], is_list: bool) -> None:
    """A line for each; of a list with brackets around all, and commas between."""
    first, between, last = ("[\n", ",\n", "\n]\n") if is_list else ("", "\n", "\n")
    for number, record in enumerate(records):
        file.write((between if number else first) + _json(record))
    file.write(last)


def _json(value: Any) -> str:
    """A value as JSON, which has no NaN: null stands for it."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_other, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, default=_other, allow_nan=False)


def _other(value: Any) -> str:
    """What JSON and cells have no kind for; bytes are the text that they encode."""
    return value.decode(errors=_ESCAPED) if isinstance(value, bytes) else str(value)


def _arrow(name: str, values: list[Any]) -> pa.Array:
    """A column of a parquet file; an AFLoRAError if it can be none."""
    try:
        column = pa.array(values)
        pq.write_table(pa.table({name: column}), pa.MockOutputStream())
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise AFLoRAError(
            f"Column {name!r} holds values that a parquet file cannot hold together ({one_line(error)}). Let the name "
            f"of --out end in .jsonl."
        ) from None
    return column


def _check_parquet(file: Path, columns: Sequence[str]) -> None:
    rows: Any = list(whole_rows(file))
    for name in columns:
        _arrow(name, [row.get(name) for row in rows])


def _append_to_parquet(source: Path, path: Path, new: Sequence[str], values: Iterator[Values]) -> None:
    """Write a parquet file's own columns, with their own types, and others behind them."""
    with source.open("rb") as file, pq.ParquetFile(file) as opened, ExitStack() as stack:
        writer: Any = None
        for batch in opened.iter_batches(batch_size=_AT_ONCE):
            table = pa.Table.from_batches([batch])
            found = list(islice(values, len(batch)))
            for place, name in enumerate(new):
                table = table.append_column(name, pa.array([row[place] for row in found]))
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)
