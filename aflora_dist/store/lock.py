"""The lock by which a run's directory has one owner, on one machine or on several that share it."""

from __future__ import annotations

import errno
import fcntl
from typing import IO

from ..notices import logger

LOCK = ".lock"  # in a run's directory; its text says who holds it


def try_lock(file: IO[str]) -> bool:
    """Take the lock on an open file, until it is closed or this process ends, kill -9 included.

    A POSIX lock: it holds across the nodes of a shared file system, and not against this process itself.

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
