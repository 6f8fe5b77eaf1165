"""Locks that an interrupted compilation has left: DeepSpeed would wait for their end for ever, without a word.

With torch before 2.14, where the lock is that a file is there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch.utils import cpp_extension

from ..errors import AFLoRAError
from ..notices import from_launcher

PATIENCE = 600.0  # seconds in which a compilation on another, busy node has to write a file
_OF_ONE_NODE = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "ramfs", "rootfs", "overlay", "apfs"}


def check_locks(ops: Sequence[str]) -> None:
    """Raise an AFLoRAError if one of DeepSpeed's compiled ops waits behind a lock that nobody holds.

    A process that compiles keeps the lock's file open, so on this node a look is enough. In a folder that other nodes
    see, too, such as a shared home, one of them may compile, for this job or another: then it is waited for, as long as
    something is written there.
    """
    if not hasattr(cpp_extension, "FileBaton"):  # torch 2.14: a lock ends with who holds it, and its file stays
        return
    for lock in (_folder() / op / "lock" for op in ops):
        if lock.exists() and _shared(lock.parent):
            _wait(lock)
        if _abandoned(lock):
            time.sleep(1.0)  # it may just be removed
        if _abandoned(lock):
            raise AFLoRAError(
                f"{lock} is left of a compilation of DeepSpeed's {lock.parent.name} that was interrupted, and no "
                f"process of this node holds it: DeepSpeed would wait for ever. Remove the folder (rm -r "
                f"{lock.parent}), unless another machine is compiling in it just now."
            )


def _folder() -> Path:
    """Where this build of torch keeps what it has compiled, by its device, such as py311_cpu or py311_cu130."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root)
    device = "cpu"
    if version := torch.version.hip or torch.version.cuda:
        device = f"{'rocm' if torch.version.hip else 'cu'}{version.replace('.', '')}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{python}_{device}"


def _shared(folder: Path) -> bool:
    """Whether other nodes may see a folder: it is on none of the file systems that only this one sees."""
    found = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    folder = folder.resolve()
    return next((found[str(at)] for at in (folder, *folder.parents) if str(at) in found), "") not in _OF_ONE_NODE


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
        if not said and from_launcher("LOCAL_RANK", "0") == "0":
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
