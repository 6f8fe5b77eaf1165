"""CSV and TSV. Every cell is text; what it stands for, its column says, not its value.

CSV is RFC 4180's, to the letter where it has quotes. TSV is read without quoting, as GLUE's files are, so that a lone
quote swallows no rows; but where the quotes stand exactly as a program puts them that quotes cells (pandas, Excel, R),
it is read as that program wrote it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ...errors import AFLoRAError
from .found import Found
from .lines import shown, text_lines

_MAX_CELL = 2**31 - 1  # characters; more than the csv module's 131,072
_QUOTED = '"[^"]*(?:""[^"]*)*"'
_GRAMMARS = {
    delimiter: re.compile(f'(?:{_QUOTED}|[^"{delimiter}]*)(?:{delimiter}(?:{_QUOTED}|[^"{delimiter}]*))*')
    for delimiter in (",", "\t")
}
# The characters that make a program quote a cell: Python's csv module and pandas; Excel.
_QUOTING_PROGRAMS = ('\t\r\n"', '\t\r\n",')
_TAB = "\t"
Row = tuple[int, list[str]]  # the line in which it begins, its cells


def read_csv(path: Path, wanted: Collection[str]) -> Found:
    """Columns of text.

    Raises:
        AFLoRAError: A row that has not as many cells as the header; quotes out of place; a wanted column's name that
            stands there twice; an empty file. With the line.
    """
    return _columns(path, _quoted_rows(path, ","), wanted, "commas", "A cell that holds a comma has to be in quotes.")


def read_tsv(path: Path, wanted: Collection[str]) -> Found:
    """Columns of text; raises as `read_csv` does, and where it cannot be told whether cells are quoted."""
    quoted, reason = _is_quoted(path)
    rows = _quoted_rows(path, "\t") if quoted else plain_rows(path)
    return _columns(path, rows, wanted, "tabs", reason)


def plain_rows(path: Path) -> Iterator[Row]:
    """The rows of a TSV without quoting; blank lines are none."""
    for line, text in enumerate(text_lines(path), start=1):
        body = text.rstrip("\r\n")
        if "\r" in body:
            raise _lone_return(path, line)
        if body:
            yield line, body.split("\t")


def positions(path: Path, header: list[str], wanted: Collection[str]) -> dict[str, int]:
    """Where the wanted columns are that a header names."""
    for name in wanted:
        if header.count(name) > 1:
            raise AFLoRAError(f"{path}, line 1: the header names column {name!r} {header.count(name)} times.")
    return {name: place for place, name in enumerate(header) if name in wanted}


def _columns(path: Path, rows: Iterator[Row], wanted: Collection[str], separators: str, hint: str) -> Found:
    lines: list[int] = []
    with _long_cells():
        _, header = next(rows, (0, None))
        if header is None:
            raise AFLoRAError(f"{path} is empty. Its first line has to name the columns, separated by {separators}.")
        _refuse_separators(path, header, wanted, separators)
        places = positions(path, header, wanted)
        values: dict[str, list[str]] = {name: [] for name in places}
        for line, cells in rows:
            if len(cells) != len(header):
                found = f"{path}, line {line}: {len(cells)} fields, the header has {len(header)}."
                ends = len(cells) == len(header) + 1 and not cells[-1]
                raise AFLoRAError(f"{found} {'The last one is empty: remove it.' if ends else hint}".rstrip())
            if len(header) > 1 and [cells[0].removeprefix("\ufeff"), *cells[1:]] == header:
                raise AFLoRAError(f"{path}, line {line}: the header again, as between two files. Leave it out.")
            lines.append(line)
            for name, place in places.items():
                values[name].append(cells[place])
    arrays = {name: pa.array(cells, pa.string()) for name, cells in values.items()}
    return Found(header, arrays, pa.array(lines, pa.int64()))


def _refuse_separators(path: Path, header: list[str], wanted: Collection[str], separators: str) -> None:
    if header[0] not in wanted and re.fullmatch("sep=.?", header[0]):
        raise AFLoRAError(f"{path}, line 1: {shown(header[0])} is for Excel alone. Remove the line.")
    found = next((character for character in ",;\t|" if character in header[0]), None)
    if len(header) == 1 and found is not None and header[0] not in wanted:
        raise AFLoRAError(
            f"{path}, line 1: {shown(header[0])} is one name, for columns are separated by {separators} in "
            f"{path.suffix}. Save it with {separators}{', or name it .tsv' if found == _TAB else ''}."
        )


def _quoted_rows(path: Path, delimiter: str) -> Iterator[Row]:
    for line, raw, cells in _records(path, delimiter):
        body = raw.rstrip("\r\n")
        if '"' in body and not _GRAMMARS[delimiter].fullmatch(body):
            last = line + body.count("\n")
            raise AFLoRAError(
                f"{path}, {f'line {line}' if last == line else f'lines {line} to {last}'}: a quote is out of place "
                f'near {shown(body)}. A cell that holds a quote is itself in quotes, and its quotes are doubled: "".'
            )
        yield line, cells


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, str, list[str]]]:
    """(first line, text, cells) of what the csv module takes for rows; blank lines are none."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for text in text_lines(path):
            taken.append(text)
            yield text

    reader, first = csv.reader(lines(), delimiter=delimiter), 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:  # cells may be long, so nothing else is left for it to complain of
            raise _lone_return(path, reader.line_num) from None
        if cells is None:
            return
        if cells:
            yield first, "".join(taken), cells
        taken.clear()
        first = reader.line_num + 1


def _is_quoted(path: Path) -> tuple[bool, str]:
    """Whether a TSV's cells are quoted; if not, why its quotes do not count, where it has any.

    Raises:
        AFLoRAError: A quoted cell would hold what is as well a row of its own.
    """
    if not any(text.startswith('"') or '\t"' in text for text in text_lines(path)):
        return False, ""
    possible, whole_rows, width = list(_QUOTING_PROGRAMS), "", 0
    with _long_cells():
        for line, raw, cells in _records(path, "\t"):
            body = raw.rstrip("\r\n")
            if width == 0:
                if body.startswith('"') or '\t"' in body:  # no name has quotes around it
                    return True, ""
                width = len(cells)
            possible = [needs for needs in possible if body == _written(cells, needs)]
            whole = [text.count("\t") == width - 1 for text in body.split("\n")]
            if not possible or (len(cells) != width and all(whole)):
                return False, f"(Its quotes are read as text, since line {line} has some that quote no cell.)"
            # The first line and the last may look so for no other reason than where the cell stands.
            if not whole_rows and len(whole) > 1 and (all(whole) or any(whole[1:-1])):
                whole_rows = f"{path}, lines {line} to {line + len(whole) - 1}"
    if whole_rows:
        raise AFLoRAError(
            f"{whole_rows}: between two quotes there are whole rows. If they are rows, remove the quotes; if they are "
            f"one cell's text, save the file as CSV or JSON lines."
        )
    return True, ""


def _written(cells: list[str], needs: str) -> str:
    """A row as a program writes it that quotes the cells that hold one of some characters."""
    if cells == [""]:
        return '""'
    return "\t".join(
        '"' + cell.replace('"', '""') + '"' if any(character in cell for character in needs) else cell for cell in cells
    )


def _lone_return(path: Path, line: int) -> AFLoRAError:
    return AFLoRAError(
        f"{path}, line {line}: a carriage return without a line feed. Save the file with lines that end in LF or CR LF "
        f"(within a text it has to be in quotes)."
    )


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
