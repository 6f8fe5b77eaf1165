"""A JSON file that holds one list, of whatever length: element by element, with no more of the file held than that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import AFLoRAError
from ...untrusted import refuse_deep_json
from .lines import shown, text_pieces

BLANK = " \t\r\n"
_MARK = re.compile(rf"[{BLANK}]*(\[[{BLANK}]*\]|[\[,\]]?)[{BLANK}]*")  # between the elements of a list
_PIECE = 1_000_000  # bytes that are read at once


def text_begins_with(path: Path, mark: str) -> bool:
    """Whether a file's first character that is no blank is this one."""
    return next(filter(None, (text.strip(BLANK) for text in text_pieces(path, _PIECE))), "").startswith(mark)


def list_elements(path: Path, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Those of a file's one list: the line in which each begins, and its value.

    Raises:
        AFLoRAError: There is no such list, or something behind it; with the line.
    """
    held, expected = _Held(path), "["
    while True:
        mark = held.mark()
        if mark.endswith("]"):
            break
        if mark != expected:
            found = shown(mark or held.rest) if mark or held.rest else "the end of the file"
            raise AFLoRAError(f"{path}, line {held.line}: no JSON: {found} instead of a comma or ] in its list.")
        line = held.line
        yield line, held.value(decoder)
        expected = ","
    if held.rest:
        raise AFLoRAError(f"{path}, line {held.line}: {shown(held.rest)} after the end of its list.")


class _Held:
    """Of a file's text as much as its next value needs."""

    def __init__(self, path: Path) -> None:
        self._path, self._pieces = path, text_pieces(path, _PIECE)
        self._text, self._place, self._whole = "", 0, False  # whole: it goes to the end of the file
        self._column = 0  # of the text's first character in its line
        self.line = 1  # of the place

    @property
    def rest(self) -> str:
        """What comes next, or its beginning."""
        return self._text[self._place :][:20]

    def mark(self) -> str:
        """Pass over what stands between two elements; without blanks."""
        while True:
            found = _MARK.match(self._text, self._place)
            assert found is not None
            if found.end() < len(self._text) or self._whole:
                self._pass(found.end())
                return found[1]
            self._read()

    def value(self, decoder: json.JSONDecoder) -> Any:
        """Pass over the value that begins here.

        Raises:
            AFLoRAError: There is none, or one that is nested too deep or has a key twice.
        """
        while True:
            try:
                value, end = _decoded(decoder, self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16  # by where reading ended
                if self._whole or not cut:
                    raise self._refused(error) from None
            except ValueError as error:
                raise AFLoRAError(f"{self._path}, line {self.line}: no JSON: {str(error).split(';')[0]}.") from None
            else:
                if end < len(self._text) or self._whole:
                    self._pass(end)
                    return value
            self._read()

    def _refused(self, error: json.JSONDecodeError) -> AFLoRAError:
        begin = self._text.rfind("\n", 0, error.pos)
        column = error.pos - begin + (self._column if begin < 0 else 0)
        line = self.line + self._text.count("\n", self._place, error.pos)
        return AFLoRAError(f"{self._path}, line {line}: no JSON: {error.msg} (character {column}).")

    def _pass(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> None:
        """Hold what begins at the place, and as much again as that is."""
        begin = self._text.rfind("\n", 0, self._place)
        self._column = self._place - begin - 1 + (self._column if begin < 0 else 0)
        pieces, more = [self._text[self._place :]], 0
        while more <= len(pieces[0]) and not self._whole:
            piece = next(self._pieces, "")
            self._whole = not piece
            pieces.append(piece)
            more += len(piece)
        self._text, self._place = "".join(pieces), 0


def _decoded(decoder: json.JSONDecoder, text: str, place: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends."""
    try:
        value, end = decoder.raw_decode(text, place)
    except RecursionError:  # too deep for Python's stack, too
        refuse_deep_json(text, place)
        raise
    refuse_deep_json(text, place, end)
    return value, end
