"""How much of the machine's memory this process has held at most. Imports no torch."""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_resident() -> int:
    """Bytes of this program alone: what getrusage says begins with those of the program that started it (Linux)."""
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
