"""The lock by which a run's directory has one owner, on one machine or on several that share it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..errors import AFLoRAError
from ..notices import logger

LOCK = ".lock"  # in a run's directory; its text says who holds it


def try_lock(file: IO[str]) -> bool:
    """Take the lock on an open file, until it is closed or this process ends, kill -9 included.

    A POSIX lock: it holds across the nodes of a shared file system, and not against this process itself. It ends, too,
    where this process opens the same file again and closes that.

    Returns:
        Whether it is this process's now.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning(f"no locks on this file system ({error.strerror}): see that one job only runs here.")
    return True


def this_job() -> str:
    """What the lock's file says of this process."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}"


def refuse_another(folder: Path, mine: IO[str]) -> None:
    """Raise an AFLoRAError where another job holds the folder that this one locked: it was deleted, or moved, since.

    The file that is locked is not opened for it: to close it once gives a POSIX lock up, whoever else has it open.

    Args:
        mine: The folder's lock as this job took it.
    """
    with suppress(OSError):
        if os.path.samestat(os.stat(folder / LOCK), os.fstat(mine.fileno())):
            return
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
        if holder not in ("", this_job()):  # some file systems number a file anew
            raise AFLoRAError(
                f"{folder} was deleted or moved while this job trained, and another job has begun there: {holder}. "
                f"Nothing more of this one is written among its files."
            )
