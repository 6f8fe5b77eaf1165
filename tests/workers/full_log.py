"""The main job on two ranks; the main process's disk is full when it writes the freeze log's second line."""

from __future__ import annotations

import resource
import sys
from typing import Any

from aflora_dist.store.rundir import RunDirectory
from aflora_dist.training import run

append = RunDirectory.append


def filling(self: RunDirectory, name: str, line: dict[str, Any]) -> None:
    path = self.path / name
    if self.writes and name == "freeze_log.jsonl" and path.exists():
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    append(self, name, line)


RunDirectory.append = filling  # type: ignore[method-assign]
sys.exit(run.main(sys.argv[1:]))
