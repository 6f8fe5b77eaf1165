"""Files of text, line by line. Nothing that is not UTF-8 text comes through."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import AFLoRAError
from ...untrusted import refuse_pointer

LINE = "\n"  # the column of lines; none that anybody wants
_ROWS, _CHARACTERS = 10_000, 16_000_000  # that are held as Python's at once; or one row
# What other files begin with, in lower case.
_OTHER_FILES = {
    b"\xff\xfe\0\0": "UTF-32 text. Save it as UTF-8",
    b"\0\0\xfe\xff": "UTF-32 text. Save it as UTF-8",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip. Unpack it first",
    b"bzh91ay&sy": "compressed by bzip2. Unpack it first",
    b"\xfd7zxz\0": "compressed by xz. Unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Unpack it first",
    b"pk\x03\x04": "a zip archive, or a workbook. Unpack it first, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a workbook, or another file of Office. Save the sheet as CSV",
    b"%pdf-": "a PDF. Save its text as one of the kinds that are read",
}
_PARQUET = {b"par1\x15": "parquet. Name it .parquet"}


def refuse_other_files(path: Path) -> None:
    """Raise an AFLoRAError for a file that begins as one of quite another kind does."""
    refuse_pointer(path, _OTHER_FILES if path.suffix.lower() == ".parquet" else _OTHER_FILES | _PARQUET)


def text_lines(path: Path) -> Iterator[str]:
    """A file's lines with their ends (LF, or CR and LF), less the byte order mark at its start.

    Raises an AFLoRAError, with the line, for a byte that is not UTF-8, or a NUL.
    """
    return text_pieces(path, -1)


def text_pieces(path: Path, most: int) -> Iterator[str]:
    """As `text_lines`, but of lines longer than so many bytes pieces, one after the other; -1: whole lines."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, before, first = 1, 0, True  # `before`: bytes of this line that have been read
    with path.open("rb") as file:
        while True:
            raw = file.readline(most)
            ended = raw.endswith(b"\n")
            cut = len(decoder.getstate()[0])  # bytes of a character that went on
            try:
                text = decoder.decode(raw, final=ended or not raw)
            except UnicodeDecodeError as error:
                at, byte = before - cut + error.start + 1, error.object[error.start]
                raise AFLoRAError(
                    f"{path}, line {line}: byte {at} (0x{byte:02x}) is not UTF-8. Save the file as UTF-8."
                ) from None
            if "\0" in text:
                raise AFLoRAError(
                    f"{path}, line {line}: it holds a NUL, which no text does. Save the file as UTF-8 text."
                )
            if not raw:
                return
            if text:  # and not a part of a character alone
                yield text.removeprefix("\ufeff") if first else text
            line, before, first = (line + 1, 0, False) if ended else (line, before + len(raw), first and not text)


def in_pieces(rows: Iterable[tuple[int, Sequence[Any]]]) -> Iterator[tuple[list[int], list[tuple[Any, ...]]]]:
    """The lines of rows, and their values column by column: of as many rows at once as memory holds in any case."""
    lines: list[int] = []
    values: list[Sequence[Any]] = []
    size = 0
    for line, row in rows:
        lines.append(line)
        values.append(row)
        size += sum(len(value) for value in row if isinstance(value, str))
        if len(lines) == _ROWS or size > _CHARACTERS:
            yield lines, list(zip(*values, strict=True))
            lines, values, size = [], [], 0
    if lines:
        yield lines, list(zip(*values, strict=True))


def shown(value: Any, most: int = 60) -> str:
    """The beginning of a value as Python writes it, for an error of one line."""
    if isinstance(value, str):
        return repr(value if len(value) <= most else f"{value[:most]}...")
    said = repr(value)
    return said if len(said) <= most else f"{said[:most]} ..."


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names, for an error of one line."""
    short = [name if len(name) <= 40 else f"{name[:40]}..." for name in names[:most]]
    said = ", ".join(name if name.isprintable() and name and name == name.strip() else repr(name) for name in short)
    return f"{said}, ... ({len(names)} in all)" if len(names) > most else said or "(none)"
