"""The main job in which only the main process may read a checkpoint."""

from __future__ import annotations

import os
from typing import Any

from aflora_dist.store import checkpoint
from aflora_dist.training import run

_load = checkpoint.load


def load(*args: Any) -> Any:
    assert os.environ.get("RANK", "0") == "0", "another rank reads the checkpoint, too"
    return _load(*args)


def main(arguments: list[str]) -> int:
    checkpoint.load = load
    return run.main(arguments)
