"""Which process this is, and of how many: the one place where that is asked."""

from __future__ import annotations

import os

import torch.distributed as dist


def rank() -> int:
    """This process's, by the process group or, before there is one, by the launcher."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many ranks there are, known in the same way."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
