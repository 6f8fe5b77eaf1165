"""What the package has to say beside errors and results, on one logger: `logging.getLogger("aflora_dist")`.

Warnings go to standard error, once for all ranks. Who wants them elsewhere, or not at all, sets that logger's handlers
or level, as of any library's.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

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
