"""Files and folders that anyone may have made: read as data, no deeper than a bound of our own, never waited for.

Python's own bound on depth is the stack's: it depends on who calls, and libraries change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import AFLoRAError, one_line

DEEPEST = 50  # levels; a dataset's deepest columns are Arrow's, which writes 64 at most
_TOO_DEEP = f"nested too deeply: more than {DEEPEST} levels"
_BRACKET_OR_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_LARGEST = 64 * 2**20  # bytes of a JSON file; the index of the largest models has a few million
_COUNTED = re.compile(r"(?:labels|layers?|experts|blocks|depths?|stages)$")
_MOST = 10_000  # of what a model is built of one by one


def load_json(text: str | bytes, **options: Any) -> Any:
    """As json.loads; a JSONDecodeError for what is too deep, too."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    refuse_deep_json(text)
    return json.loads(text, **options)


def refuse_deep_json(text: str, start: int = 0, end: int | None = None) -> None:
    """Raise json.JSONDecodeError, with the place, if what stands there is too deep. Nearly free where it cannot be."""
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST:
        return
    depth = 0
    for token in _BRACKET_OR_STRING.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            raise json.JSONDecodeError(_TOO_DEEP, text, token.start())


def refuse_deep_yaml(text: str | bytes, loader: Any) -> None:
    """Raise yaml.MarkedYAMLError, with the place, if a document is too deep, or no YAML; `loader` is one of yaml's."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=event.start_mark)


@contextmanager
def reading(path: Path, then: str = "") -> Iterator[None]:
    """Raise AFLoRAError, which says what to do `then`, for whatever a library raises: who made a file may mean harm."""
    try:
        yield
    except AFLoRAError:
        raise
    except Exception as error:
        raise AFLoRAError(f"{path} cannot be read: {one_line(error).rstrip('.')}. {then}".rstrip()) from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        AFLoRAError: It does not, or is no file, or far too large.
    """
    if not path.is_file():  # a pipe would be waited for
        raise AFLoRAError(f"{path} is not a file.")
    with reading(path):
        if path.stat().st_size > _LARGEST:
            raise AFLoRAError(f"{path} cannot be read: it has more than {_LARGEST >> 20} MiB.")
        content = load_json(path.read_bytes())
    if not isinstance(content, dict):
        raise AFLoRAError(f"{path} holds no JSON object.")
    return content


# What was downloaded in the place of a file begins so, in lower case.
_IN_ITS_PLACE = {
    b"version https://git-lfs.github.com/": "only Git LFS's pointer to the file. Get the file: git lfs pull",
    b"<!doctype html": "a web page. Download the file itself",
    b"<html": "a web page. Download the file itself",
}


def refuse_pointer(path: Path, others: Mapping[bytes, str] | None = None) -> None:
    """Raise an AFLoRAError for what tells of a file, and is not the file.

    Args:
        others: What else it is not to begin with, in lower case, and what that is.
    """
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in {**_IN_ITS_PLACE, **(others or {})}.items():
        if start.startswith(beginning):
            raise AFLoRAError(f"{path} is {kind}.")


def refuse_endless(value: Any, path: Path) -> None:
    """Raise for a model's configuration by which a model would be built for hours."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            refuse_endless(item, path)
        elif isinstance(item, int | float) and item > _MOST and _COUNTED.search(str(key)):
            raise AFLoRAError(f"{path}: {key} is {item:.6g}; no model has more than {_MOST:,}.")


def check_copied(path: Path, folder: Path) -> Path:
    """A file of `folder` that is copied as it is, and may be published; an AFLoRAError if it links to one elsewhere."""
    home, target = folder.resolve(), path.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]  # the hub's cache, which links to its own blobs
    if not target.is_relative_to(home):
        raise AFLoRAError(
            f"{path} is a link to {target}, outside of its folder, and would be copied. If that is meant, put a copy "
            f"in its place."
        )
    return path
