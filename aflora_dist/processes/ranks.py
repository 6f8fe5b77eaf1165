"""Which process this is, and of how many: the one place where that is asked."""

from __future__ import annotations

import torch.distributed as dist

from ..errors import LaunchError
from ..notices import from_launcher

LAUNCHERS = "`accelerate launch` and torchrun set all that is needed; under Slurm: launch/slurm."


def rank() -> int:
    """This process's, by the process group or, before there is one, by the launcher."""
    return dist.get_rank() if dist.is_initialized() else launched_number("RANK", 0)


def world_size() -> int:
    """How many ranks there are, known in the same way."""
    return dist.get_world_size() if dist.is_initialized() else launched_number("WORLD_SIZE", 1)


def launched_number(variable: str, default: int) -> int:
    """What the launcher has said in an environment variable; a LaunchError if it holds no number."""
    text = from_launcher(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{variable}={text!r} is not a number. {LAUNCHERS}") from None
