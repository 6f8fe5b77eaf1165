"""Entry point of the main job: `accelerate launch -m aflora_dist.training.run [CONFIG.yaml] [--key value ...]`."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..errors import AFLoRAError, LaunchError
from ..extras import require
from ..notices import logger, quiet_libraries

_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Application timeout caused pair closure",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the main job; returns the exit status. What a user did wrong is said in a line or two."""
    undo = quiet_libraries()
    try:
        _run(sys.argv[1:] if arguments is None else arguments, undo)
    except BaseException as error:
        status = _said(error)
        _tell_the_others(error)
        if status is None:
            raise
        return status
    return 0


def _run(arguments: list[str], undo: Callable[[], None]) -> None:
    """The main job; `undo` takes back that libraries are quiet."""
    require("train", "aflora train")
    from .command_line import parse

    config, resolved = parse(arguments)
    quiet = undo if config.run.verbose else quiet_libraries
    if config.run.dry_run:
        from ..plan.command import dry_run

        quiet()
        dry_run(config, resolved)
        return
    from .loop import train  # after parsing: a wrong option should not take seconds to find

    quiet()  # DeepSpeed sets its own level on import
    result = train(config, resolved)
    if os.environ.get("RANK", "0") == "0" and result is not None:
        from ..serve.lora import leave_stock
        from ..store.records import as_result
        from ..view.report import print_summary

        try:
            leave_stock(Path(config.run.dir))
        except AFLoRAError as error:  # what was trained is whole
            logger.warning(f"lora/, which `aflora to-lora` makes at any time, is missing: {error}")
        print_summary(as_result(result), config.run.dir)


def _said(error: BaseException) -> int | None:
    """Say what a person is to know; returns the exit status, None for what nobody was expected to do."""
    speaks = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"  # once per node: its files may differ
    if isinstance(error, AFLoRAError):
        if speaks or isinstance(error, LaunchError):
            print(f"aflora: error: {error}", file=sys.stderr, flush=True)
        return 2
    # What gloo and NCCL say when the other end of a collective is gone.
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in _LOST_RANK):
        return None
    if speaks:
        print(
            "aflora: error: another rank has ended in the middle of the training; what it printed tells why. "
            "The same command with --resume goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
    return 3


def _tell_the_others(error: BaseException) -> None:
    """Who waits for this rank, or will, learns that it has ended, and why."""
    over = isinstance(error, SystemExit) and not error.code
    if os.environ.get("WORLD_SIZE", "1") == "1" or over:
        return
    with suppress(AFLoRAError, ImportError):
        from ..processes import complaint, launched_processes, part, rank

        launched_processes()  # who cannot be found cannot be told
        part(complaint(error, f"Rank {rank()}"), stay=isinstance(error, AFLoRAError))


def leave(status: int) -> NoReturn:
    """End this process with a status that is its own.

    A thread of gloo's that lets go of a tensor while Python takes itself down asks for the interpreter's lock, is ended
    for that, and C++ then aborts the process, after all is done (pytorch/pytorch#190489). So what Python does for its
    programs is done here (other threads are waited for, exit handlers run, output is flushed), and the interpreter is
    not taken down.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
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


if __name__ == "__main__":
    leave(main())
