"""Files of text, line by line. Nothing that is not UTF-8 text comes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import AFLoRAError

LINE = "\n"  # the column of lines; none that anybody wants
# What other files begin with, in lower case, and what was downloaded in place of a file.
_OTHER_FILES = {
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip. Unpack it first",
    b"pk\x03\x04": "a zip archive, or a workbook. Unpack it first, or save the sheet as CSV",
    b"version https://git-lfs.github.com/": "only Git LFS's pointer to the file. Get the file: git lfs pull",
    b"<!doctype html": "a web page. Download the file itself",
    b"<html": "a web page. Download the file itself",
}


def refuse_other_files(path: Path) -> None:
    """Raise an AFLoRAError for a file that begins as one of quite another kind does."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _OTHER_FILES.items():
        if start.startswith(beginning):
            raise AFLoRAError(f"{path} is {kind}.")


def text_lines(path: Path) -> Iterator[str]:
    """A file's lines with their ends (LF, or CR and LF), less the byte order mark at its start.

    Raises:
        AFLoRAError: A byte that is not UTF-8, or a NUL; with its line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise AFLoRAError(
                    f"{path}, line {number}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8. Save the "
                    f"file as UTF-8."
                ) from None
            if "\0" in line:
                raise AFLoRAError(
                    f"{path}, line {number}: it holds a NUL, which no text does. Save the file as UTF-8 text."
                )
            yield line.removeprefix("\ufeff") if number == 1 else line


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
