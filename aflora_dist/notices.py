"""What the package has to say beside errors and results, on one logger: `logging.getLogger("aflora_dist")`.

Warnings go to standard error, once for all ranks. Who wants them elsewhere, or not at all, sets that logger's handlers
or level, as of any library's.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

logger = logging.getLogger("aflora_dist")


def from_launcher(variable: str, default: str) -> str:
    """What the launcher has said of this process in an environment variable; one that is empty is as absent."""
    return os.environ.get(variable) or default


class _Terminal(logging.Handler):
    """Standard error as it is then, and not into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        said = f"aflora: {record.levelname.lower()}: {record.getMessage()}"
        if (bars := sys.modules.get("tqdm.auto")) is not None:
            bars.tqdm.write(said, file=sys.stderr)
        else:
            print(said, file=sys.stderr)
        sys.stderr.flush()


if not logger.handlers:
    logger.addHandler(_Terminal())
    logger.addFilter(lambda record: from_launcher("RANK", "0") == "0")
    logger.propagate = False


def write_anything() -> None:
    """A terminal, or a log, that is not UTF-8 gets a ? for what it cannot hold, which is no reason to end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # others do not fail
            stream.reconfigure(errors="replace")


def outlive_output() -> None:
    """A closed pipe or terminal, or a log on a full disk, is no reason to end hours of work: what it is told is lost.

    A pipe's reader may be the first to go: Ctrl-C ends `tee` at once, and a training only after it has saved.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "write" not in vars(stream):
            for name in ("write", "flush"):
                setattr(stream, name, _outliving(stream, getattr(stream, name)))


def _outliving(stream: io.TextIOWrapper, call: Callable[..., Any]) -> Callable[..., Any]:
    def outlived(*text: str) -> int:
        with suppress(OSError):
            try:
                call(*text)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # where room is made, it is told again
                    _lead_nowhere(stream)
        return sum(map(len, text))

    return outlived


def ended_reading(stream: TextIO) -> bool:
    """Whether the reader of a pipe, as `head`, has all that it wants, which is no error; it is told nothing more."""
    try:
        stream.flush()
    except BrokenPipeError:
        _lead_nowhere(stream)
        return True
    return False


def _lead_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


_LIBRARIES = ("DeepSpeed", "deepspeed", "accelerate", "transformers", "datasets", "torch.distributed")


def quiet_libraries() -> Callable[[], None]:
    """Leave warnings and errors; drop the libraries' progress reports, and what will change for others than us.

    Returns what takes that back (run.verbose).
    """
    filters: Any = warnings.filters
    ours = []
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(?!aflora_dist\b)")
        ours.append(filters[0])
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    bars = sys.modules.get("transformers.utils.logging")  # if unimported, it shows none
    if bars is not None:
        bars.disable_progress_bar()

    def undo() -> None:
        filters[:] = [one for one in filters if one not in ours]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars is not None:
            bars.enable_progress_bar()

    return undo
