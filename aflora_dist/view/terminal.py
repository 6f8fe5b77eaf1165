"""How the commands that look at runs speak: tables and stories to standard output, complaints to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.console import Console

_WIDTH = 120  # where output goes to no terminal


def console() -> Console:
    """Standard output. Texts of other people are printed as they are."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def warn(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"aflora: warning: {problem}", file=sys.stderr)
