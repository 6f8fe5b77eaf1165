"""Locks that an interrupted compilation has left: DeepSpeed would wait for their end for ever, without a word."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from ..errors import AFLoRAError

PATIENCE = 600.0  # seconds in which a compilation on another, busy node has to write a file


def check(ops: Sequence[str]) -> None:
    """Raise if one of DeepSpeed's compiled ops waits behind a lock that nobody holds.

    A process that compiles keeps the lock's file open, so on this node a look is enough. Where the job has other
    nodes, one of them may compile in a shared folder: then it is waited for, as long as something is written there.

    Raises:
        AFLoRAError: Names what to remove.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    several_nodes = int(world) > int(os.environ.get("LOCAL_WORLD_SIZE", world))
    for lock in _locks(ops):
        if several_nodes:
            _wait(lock)
        if _abandoned(lock):
            time.sleep(1.0)  # it may just be removed
        if _abandoned(lock):
            raise AFLoRAError(
                f"{lock} is left of a compilation of DeepSpeed's {lock.parent.name} that was interrupted, and no "
                f"process of this node holds it: DeepSpeed would wait for ever. Remove the folder (rm -r "
                f"{lock.parent}), unless another machine is compiling in it just now."
            )


def _locks(ops: Sequence[str]) -> Iterator[Path]:
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        folders = [Path(root)]
    else:  # such as py311_cpu
        python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_"
        folders = list(Path(get_default_build_root()).glob(f"{python}*"))
    for folder in folders:
        for op in ops:
            if (lock := folder / op / "lock").exists():
                yield lock


def _wait(lock: Path) -> None:
    """Until the lock is gone, or its folder has been quiet for too long."""
    said = False
    while not _held(lock):
        try:
            written = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()])
        except FileNotFoundError:
            return
        if time.time() - written > PATIENCE:
            return
        if not said and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"aflora: waiting for another node that compiles DeepSpeed's {lock.parent.name} ({lock})", flush=True)
            said = True
        time.sleep(0.5)


def _abandoned(lock: Path) -> bool:
    return not _held(lock) and lock.exists()


def _held(lock: Path) -> bool:
    """Whether a process of this node has the file open; of other users' processes that cannot be seen."""
    try:
        held = lock.stat()
    except FileNotFoundError:
        return False
    if held.st_uid != os.geteuid():
        return True
    name = str(lock.resolve())
    for opened in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # ended or closed meanwhile, or another user's
            if os.readlink(opened) == name:
                return True
    return False
