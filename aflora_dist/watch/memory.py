"""Who allocates what on a GPU around a freeze: a snapshot that https://pytorch.org/memory_viz draws."""

from __future__ import annotations

from pathlib import Path

import torch

from ..compat.contract import broken, require_private
from ..compat.torch import MEMORY

_MOST = 100_000  # allocations and frees that are kept, the newest; the file grows by some hundred bytes with each


class MemoryHistory:
    """Records this process's CUDA allocations between `start` and `stop`, with the Python lines that made them.

    Raises:
        UnsupportedEngineError: This release of torch has no such recorder, or one that is called differently.
    """

    def __init__(self) -> None:
        require_private("torch", torch.cuda.memory, MEMORY)
        try:
            self.start()
            self.stop()
        except Exception as error:
            raise broken("torch", "Recording CUDA memory", error) from error

    def start(self) -> None:
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=_MOST)

    def write(self, file: Path) -> None:
        """Write what has been recorded so far, and all that is allocated now; an OSError where the disk is full."""
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))

    def stop(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)
