"""Files of text, line by line. Nothing that is not UTF-8 text comes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import AFLoRAError

# What other files begin with.
_SIGNATURES = {
    b"\xff\xfe": "UTF-16 (or 32) text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip. Unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Unpack it first",
    b"BZh": "compressed by bzip2. Unpack it first",
    b"\xfd7zXZ": "compressed by xz. Unpack it first",
    b"PK\x03\x04": "a zip archive, or a workbook. Unpack it first, or save the sheet as CSV",
    b"PAR1": "parquet. Name it .parquet",
}


def text_lines(path: Path) -> Iterator[str]:
    """A file's lines with their ends (LF, or CR and LF), less the byte order mark at its start.

    Raises:
        AFLoRAError: A byte that is not UTF-8, or a NUL; with its line.
    """
    with path.open("rb") as file:
        start = b""
        for number, raw in enumerate(file, start=1):
            start = start or raw[:8]
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                found = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8. Save the file as UTF-8"
                raise _no_text(path, number, start, found) from None
            if "\0" in line:
                raise _no_text(path, number, start, "it holds a NUL, which no text does. Save the file as UTF-8 text")
            yield line.removeprefix("\ufeff") if number == 1 else line


def _no_text(path: Path, number: int, start: bytes, found: str) -> AFLoRAError:
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return AFLoRAError(f"{path} is {kind}.")
    return AFLoRAError(f"{path}, line {number}: {found}.")


def shown(text: str) -> str:
    """The beginning of a text, for an error of one line."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names, for an error of one line."""
    short = [name if len(name) <= 40 else f"{name[:40]}..." for name in names[:most]]
    said = ", ".join(name if name.isprintable() and name and name == name.strip() else repr(name) for name in short)
    return f"{said}, ... ({len(names)} in all)" if len(names) > most else said or "(none)"
