"""What the package has to say beside errors and results, on one logger: `logging.getLogger("aflora_dist")`.

Warnings go to standard error, once for all ranks. Who wants them elsewhere, or not at all, sets that logger's handlers
or level, as of any library's.
"""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("aflora_dist")


class _Terminal(logging.Handler):
    """Standard error as it is then, and not into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        said = f"aflora: {record.levelname.lower()}: {record.getMessage()}"
        if (bars := sys.modules.get("tqdm.auto")) is not None:
            bars.tqdm.write(said, file=sys.stderr)
        else:
            print(said, file=sys.stderr)
        sys.stderr.flush()


def _is_first(record: logging.LogRecord) -> bool:
    return os.environ.get("RANK", "0") == "0"


if not logger.handlers:
    logger.addHandler(_Terminal())
    logger.addFilter(_is_first)
    logger.propagate = False
