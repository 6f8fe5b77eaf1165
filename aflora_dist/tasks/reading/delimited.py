"""CSV and TSV. Every cell is text; what it stands for, its column says, not its value.

CSV is RFC 4180's. TSV is read likewise where its header has quotes, as a program writes that quotes all texts, and else
without quoting, so that a lone quote swallows no rows; a cell that begins with one may be meant either way, and is
refused.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from ...errors import AFLoRAError
from .lines import LINE, in_pieces, shown, text_lines

_MAX_CELL = 2**31 - 1  # characters; more than the csv module's 131,072
_COMMA = " A cell that holds a comma has to be in quotes, and none ends a line."
Row = tuple[int, list[str]]  # the line in which it begins, its cells


def read_delimited(path: Path, wanted: Collection[str], plain: bool = False) -> tuple[list[str], Iterator[pa.Table]]:
    """The names of all columns; and piece by piece the cells of the wanted ones, behind a column of lines, see `Rows`.

    Args:
        plain: It is a TSV in which quotes are known to be text.

    Raises:
        AFLoRAError: A row that has not as many cells as the header; a quote out of place; a wanted column's name that
            stands there twice; an empty file; a TSV of which it cannot be told whether cells are quoted. With the line.
    """
    return read_columns(path, delimited_rows(path, plain), wanted)


def delimited_rows(path: Path, plain: bool = False) -> Iterator[Row]:
    """The rows of a CSV or TSV, the header first; `plain` as of `read_delimited`."""
    if plain:
        return plain_rows(path)
    if path.suffix.lower() == ".csv":
        return _without_blanks(path, _quoted_rows(path, ","))
    return _unquoted_rows(path) if is_plain(path) else _without_blanks(path, _quoted_rows(path, "\t"))


def is_plain(path: Path) -> bool:
    """Whether the cells of a TSV are what stands between its tabs: no name in its header is in quotes."""
    return not any(name.startswith('"') for name in plain_header(path))


def plain_header(path: Path) -> list[str]:
    """The names in a TSV's first line, with their quotes."""
    return next(plain_rows(path), (0, [""]))[1]


def plain_rows(path: Path) -> Iterator[Row]:
    """The rows of a TSV without quoting."""
    return _without_blanks(path, _plain_lines(path))


def _without_blanks(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Blank lines are no rows. In a file of one column nobody can tell, unless they are its last."""
    blank = width = 0
    for line, cells in rows:
        if not cells:
            blank = blank or line
            continue
        if blank and width == 1:
            raise AFLoRAError(
                f"{path}, line {blank}: whether this blank line is a row without text cannot be told in a file of one "
                f"column. Leave it out, or save the file as JSON lines."
            )
        blank, width = 0, width or len(cells)
        yield line, cells


def _plain_lines(path: Path) -> Iterator[Row]:
    for line, text in enumerate(text_lines(path), start=1):
        body = text.rstrip("\r\n")
        if "\r" in body:
            raise _lone_return(path, line)
        yield line, body.split("\t") if body else []


def read_columns(path: Path, rows: Iterator[Row], wanted: Collection[str]) -> tuple[list[str], Iterator[pa.Table]]:
    """What `read_delimited` gives, of rows of a file whose first is the header."""
    separator = "comma" if path.suffix.lower() == ".csv" else "tab"
    _, header = next(rows, (0, None))
    if header is None:
        raise AFLoRAError(f"{path} is empty. Its first line has to name the columns, separated by {separator}s.")
    if len(header) == 1 and header[0] not in wanted and any(other in header[0] for other in ",;\t|"):
        other_name = ", or name it .tsv" if "\t" in header[0] else ""
        raise AFLoRAError(
            f"{path}, line 1: {shown(header[0])} is one name, for columns are separated by {separator}s in "
            f"{path.suffix}. Save it with {separator}s{other_name}."
        )
    for name in wanted:
        if header.count(name) > 1:
            raise AFLoRAError(f"{path}, line 1: the header names column {name!r} {header.count(name)} times.")
    places = {name: place for place, name in enumerate(header) if name in wanted}
    return header, _cells(path, rows, header, places, _COMMA if separator == "comma" else "")


def _cells(
    path: Path, rows: Iterator[Row], header: list[str], places: Mapping[str, int], hint: str
) -> Iterator[pa.Table]:
    """Pieces of the columns that stand at these places."""

    def checked() -> Iterator[Row]:
        for line, cells in rows:
            if len(cells) != len(header):
                raise AFLoRAError(f"{path}, line {line}: {len(cells)} fields, expected {len(header)}.{hint}")
            if len(header) > 1 and [cells[0].removeprefix("\ufeff"), *cells[1:]] == header:
                raise AFLoRAError(f"{path}, line {line}: the header again, as between two files. Leave it out.")
            yield line, [cells[place] for place in places.values()]

    for lines, columns in in_pieces(checked()):
        arrays = {name: pa.array(cells, pa.string()) for name, cells in zip(places, columns, strict=True)}
        yield pa.table({LINE: pa.array(lines, pa.int64()), **arrays})


def _quoted_rows(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CELL)
    reader, first = csv.reader(text_lines(path), delimiter=delimiter, strict=True), 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "new-line" in str(error):
                raise _lone_return(path, reader.line_num) from None
            place = f"line {first}" if reader.line_num == first else f"lines {first} to {reader.line_num}"
            raise AFLoRAError(
                f"{path}, {place}: a quote is out of place ({error}). A cell that begins with a quote ends with one, "
                f'and the quotes in it are doubled: "".'
            ) from None
        if cells is None:
            return
        yield first, cells
        first = reader.line_num + 1


def _unquoted_rows(path: Path) -> Iterator[Row]:
    for line, cells in plain_rows(path):
        odd = next((cell for cell in cells if cell.startswith('"')), None)
        if odd is not None:
            raise AFLoRAError(
                f"{path}, line {line}: whether the quote at the start of {shown(odd)} is text cannot be told in a TSV. "
                f"Save the file as CSV or JSON lines, or put all texts in quotes, the header's names too."
            )
        yield line, cells


def _lone_return(path: Path, line: int) -> AFLoRAError:
    return AFLoRAError(
        f"{path}, line {line}: a carriage return without a line feed. Save the file with lines that end in LF or CR LF "
        f"(within a text it has to be in quotes)."
    )
