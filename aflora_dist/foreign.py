"""Folders that anyone may have made: read as data, never waited for, and never left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import nested
from .errors import AFLoRAError, one_line

_LARGEST = 64 * 2**20  # bytes of a JSON file; the index of the largest models has a few million
_COUNTED = re.compile(r"(?:labels|layers?|experts|blocks|depths?|stages)$")
_MOST = 10_000  # of what a model is built of one by one


@contextmanager
def reading(path: Path, then: str = "") -> Iterator[None]:
    """Say in a sentence what a library raises over this file or folder, whatever it is: who made it may mean harm.

    Args:
        then: What to do instead.

    Raises:
        AFLoRAError: In place of any other error.
    """
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
        content = nested.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise AFLoRAError(f"{path} holds no JSON object.")
    return content


def refuse_endless(value: Any, path: Path) -> None:
    """Raise for a model's configuration by which a model would be built for hours."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            refuse_endless(item, path)
        elif isinstance(item, int | float) and item > _MOST and _COUNTED.search(str(key)):
            raise AFLoRAError(f"{path}: {key} is {item:.6g}; no model has more than {_MOST:,}.")


def check_copied(path: Path, folder: Path) -> Path:
    """A file of `folder` that is copied as it is, and may be published.

    Raises:
        AFLoRAError: It is a link to a file elsewhere.
    """
    home, target = folder.resolve(), path.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]  # the hub's cache, which links to its own blobs
    if not target.is_relative_to(home):
        raise AFLoRAError(
            f"{path} is a link to {target}, outside of its folder, and would be copied. If that is meant, put a copy "
            f"in its place."
        )
    return path
