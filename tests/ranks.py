"""Ranks forked from one warm process that has imported everything: what `accelerate launch` starts, in a second.

Each rank lets accelerate's own launcher set its environment; only where that would start processes through torchrun,
the rank goes on as one of them. As with torchrun, the store that ranks meet at is not theirs, and a rank that fails
ends the others.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL for what is left when a rank has failed
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
}


# pyarrow's allocator would start a thread on import.
WARM_ENVIRONMENT = {**ENVIRONMENT, "JE_ARROW_MALLOC_CONF": "background_thread:false"}


@cache
def warm_process() -> ForkServerContext:
    """Start the process that ranks are forked from; it ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with mock.patch.dict(os.environ, WARM_ENVIRONMENT):
        forkserver.ensure_running()
    return context


class Ranks:
    """Running ranks of one job; like a Popen object, and a rank can be sent a signal.

    Args:
        launcher: The options of `accelerate launch`; they must ask for `processes` processes on this machine.
        command: What is launched: a script or `-m MODULE`, and its arguments.
        environment: All variables that the launcher would be started with.
    """

    def __init__(
        self, launcher: Sequence[str], processes: int, command: Sequence[str], environment: dict[str, str]
    ) -> None:
        from torch.distributed import TCPStore

        context = warm_process()
        self.pid = os.getpid()  # whose children they are
        self.args = [*launcher, *command]
        self.returncode: int | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        files = [str(self._folder / name) for name in ("stdout", "stderr")]
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._deadline: float | None = None
        self._ranks: list[ForkServerProcess] = []
        try:
            for rank in range(processes):
                place = (rank, processes, self._store.port)
                self._ranks.append(context.Process(target=_rank, args=(place, self.args, environment, files)))
                self._ranks[-1].start()
        except BaseException:
            self.kill()
            raise

    @property
    def pids(self) -> list[int]:
        return [rank.pid or 0 for rank in self._ranks]

    def send_signal(self, number: int, rank: int) -> None:
        os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()

    def poll(self) -> int | None:
        """The job's exit status once all ranks have ended; ends the others when one has failed."""
        codes = [rank.exitcode for rank in self._ranks]
        if self.returncode is None and any(codes):
            self.returncode = next(code for code in codes if code)
        if None not in codes:
            self.returncode = self.returncode or 0
            return self.returncode
        if any(codes):
            self._end_others()
        return None

    def _end_others(self) -> None:
        left = [rank for rank in self._ranks if rank.exitcode is None]
        if self._deadline is None:
            self._deadline = time.monotonic() + PATIENCE
            for rank in left:
                rank.terminate()
        elif time.monotonic() > self._deadline:
            for rank in left:
                rank.kill()

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end of all ranks; none is left when `subprocess.TimeoutExpired` is raised."""
        end = time.monotonic() + timeout
        try:
            while self.poll() is None:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
                connection.wait([rank.sentinel for rank in self._ranks if rank.exitcode is None], 0.1)
        finally:
            self.kill()
        assert self.returncode is not None
        return self.returncode

    def output(self) -> tuple[str, str]:
        """What all ranks have printed so far: stdout, stderr."""
        files = [self._folder / name for name in ("stdout", "stderr")]
        stdout, stderr = (file.read_text(errors="replace") if file.exists() else "" for file in files)
        return stdout, stderr

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        return self.output()


def _rank(place: tuple[int, int, int], arguments: list[str], environment: dict[str, str], files: list[str]) -> None:
    """The forked process: take over output and environment, run, and leave without tearing anything down.

    An interpreter that ends normally may be aborted by gloo's threads.
    """
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = 1
    try:
        _start(place, arguments, environment)
        status = 0
    except SystemExit as end:
        status = _status(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(code: Any) -> int:
    """The exit status that Python makes of sys.exit(code)."""
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _start(place: tuple[int, int, int], arguments: list[str], environment: dict[str, str]) -> None:
    """Run `accelerate launch ARGUMENTS` up to where processes would be started, and go on as rank `place[0]`."""
    import torch
    from accelerate.commands import launch

    from tests import preload

    assert preload.THREADS == 1, "an import in tests/preload.py starts threads: locks may be held when ranks are forked"
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # as in a new process
    atexit._clear()  # what the warm process has to do at its end is not this rank's
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)

    def as_torchrun(args: Any) -> None:
        assert int(args.nproc_per_node) == place[1], f"the launcher's options ask for {args.nproc_per_node} processes"
        os.environ.update(_torchrun_variables(*place))
        _run(args)

    def alone(args: Any) -> None:
        os.environ.update(launch.prepare_simple_launcher_cmd_env(args)[1])
        _run(args)

    with mock.patch("torch.distributed.run.run", as_torchrun), mock.patch.object(launch, "simple_launcher", alone):
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))


def _torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for each process, on one machine."""
    number = {name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")}
    size = {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")}
    group = {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default"}
    elastic = {"RESTART_COUNT": "0", "MAX_RESTARTS": "0", "RUN_ID": "none", "USE_AGENT_STORE": "True"}
    elastic = {f"TORCHELASTIC_{name}": value for name, value in elastic.items()}
    return {**number, **size, **group, **elastic, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _run(args: Any) -> None:
    """Run the script or module as Python would have; a warning that is due to this package is an error."""
    warnings.filterwarnings("error", module=r"aflora_dist\b")
    sys.argv = [args.training_script, *args.training_script_args]
    if args.module:
        sys.path.insert(0, str(ROOT))
        sys.modules.pop(args.training_script, None)  # runpy warns of a module that is there already
        runpy.run_module(args.training_script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(args.training_script).resolve().parent))
        runpy.run_path(args.training_script, run_name="__main__")
