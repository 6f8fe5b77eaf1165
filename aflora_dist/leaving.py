"""How a command that several ranks run comes to its end: what is said, who is told, and with which status.

Imports nothing heavy: a wrong option should not take seconds to find.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from .errors import AFLoRAError, DivergedError, LaunchError, told_of_long_names
from .notices import from_launcher, outlive_output

_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Application timeout caused pair closure",
)


def guarded(job: Callable[[], None], what: str, then: str) -> int:
    """Do a rank's work; returns the exit status. What a user did wrong is said in a line or two.

    Args:
        what: What the job is called.
        then: What to do where another rank is gone.
    """
    outlive_output()
    try:
        with told_of_long_names():
            job()
    except BaseException as error:
        status = _said(error, what, then)
        _tell_the_others(error)
        if status is None:
            raise
        return status
    return 0


def leave(status: int) -> NoReturn:
    """End this process with a status that is its own.

    A thread of gloo's that lets go of a tensor while Python takes itself down asks for the interpreter's lock, is ended
    for that, and C++ then aborts the process, after all is done (pytorch/pytorch#190489). So what Python does for its
    programs is done here (other threads are waited for, exit handlers run, output is flushed), and the interpreter is
    not taken down.
    """
    if from_launcher("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()  # logging's, trackers', a coverage measurement's
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 120  # as Python's own
    os._exit(status)


def _said(error: BaseException, what: str, then: str) -> int | None:
    """Say what a person is to know; returns the exit status, None for what nobody was expected to do."""
    speaks = from_launcher("LOCAL_RANK", from_launcher("RANK", "0")) == "0"  # once per node: its files may differ
    if isinstance(error, KeyboardInterrupt):
        if speaks:
            print(f"aflora: interrupted. {then}", file=sys.stderr, flush=True)
        return 130
    if isinstance(error, AFLoRAError):
        if speaks or isinstance(error, LaunchError):
            what = "diverged" if isinstance(error, DivergedError) else "error"  # by which a study tells them apart
            print(f"aflora: {what}: {error}", file=sys.stderr, flush=True)
        return 2
    # What gloo and NCCL say when the other end of a collective is gone.
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in _LOST_RANK):
        return None
    if speaks:
        print(
            f"aflora: error: another rank has ended in the middle of the {what}; what it printed tells why. {then}",
            file=sys.stderr,
            flush=True,
        )
    return 3


def _tell_the_others(error: BaseException) -> None:
    """Who waits for this rank, or will, learns that it has ended, and why."""
    over = isinstance(error, SystemExit) and not error.code
    if from_launcher("WORLD_SIZE", "1") == "1" or over:
        return
    with suppress(AFLoRAError, ImportError):
        from .processes import complaint, launched_processes, part, rank

        launched_processes()  # who cannot be found cannot be told
        part(complaint(error, f"Rank {rank()}"), stay=isinstance(error, AFLoRAError))
