"""What a node has made once, in files that all its ranks read; later runs find it there.

A file's name is made of what it depends on, the code that makes it among it. So nothing is ever overwritten, and the
folder can be emptied at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from accelerate.state import PartialState

from ..errors import AFLoRAError, one_line


def cache_folder() -> Path:
    """Where it is kept: beside what the library datasets keeps (HF_DATASETS_CACHE)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "aflora"


@cache
def code() -> list[str]:
    """What stands for the code that makes it: of this package's tasks, and the releases of what they call."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        content.update(path.read_bytes())
    return [content.hexdigest(), *(version(name) for name in ("transformers", "tokenizers", "datasets"))]


def key(*depends_on: Any) -> str:
    """A name for what depends on these values and on the code: 40 hexadecimal digits."""
    return hashlib.sha256(json.dumps([*depends_on, code()]).encode()).hexdigest()[:40]


def found_or_made(
    what: str,
    files: Mapping[Path, int | None],
    make: Callable[[list[Path], Path], None],
    make_in_memory: Callable[[], datasets.Dataset],
) -> datasets.Dataset:
    """The rows of files of the cache folder, one after the other, mapped into memory.

    Args:
        what: What a warning calls them.
        files: How many rows each has; None: any number.
        make: Makes those that are missing; in a folder, from which each is put in place when it is whole.
        make_in_memory: Where files cannot be kept there.

    Raises:
        AFLoRAError: What makes them raises it.
    """
    try:
        if missing := [file for file in files if not file.exists()]:
            cache_folder().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="making-", dir=cache_folder()) as folder:
                make(missing, Path(folder))
        found = [datasets.Dataset.from_file(str(file)) for file in files]
        for part, (file, rows) in zip(found, files.items(), strict=True):
            if rows is not None and rows != len(part):
                raise OSError(f"{file.name} holds {len(part)} rows instead of {rows}; remove it")
        return found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
    except AFLoRAError:
        raise
    except (OSError, ValueError) as error:  # read-only, full, or damaged: Arrow's errors are of both kinds
        if PartialState().is_local_main_process:
            reason = getattr(error, "strerror", None) or one_line(error)
            print(
                f"The {what} are not kept: {next(iter(files))} cannot be used ({reason}). Every process makes them for "
                f"itself; HF_DATASETS_CACHE names another folder.",
                file=sys.stderr,
                flush=True,
            )
        return make_in_memory()


def put_in_place(made: Path, kept: Path) -> None:
    """Have a whole file where others look for it."""
    try:
        os.link(made, kept)  # unlike a rename, it takes no file away from another run that was faster and reads it
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        made.replace(kept)
