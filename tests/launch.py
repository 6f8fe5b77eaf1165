"""Starts ranks: forked from a warm process (tests/ranks.py), or really through `accelerate launch`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.ranks import ENVIRONMENT, ROOT, Ranks
from tests.workers.series import END

ENGINES = ("ddp", "zero1", "zero2", "zero3")
MAIN_JOB = ("-m", "aflora_dist.training.run")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def launch_arguments(engine: str, processes: int, mixed_precision: str = "no") -> list[str]:
    """The options of `accelerate launch` for an engine; "fsdp2" is set up by the worker itself."""
    common = ["--num_processes", str(processes), "--num_machines", "1", "--dynamo_backend", "no"]
    common += ["--mixed_precision", mixed_precision, "--main_process_port", str(free_port())]
    if engine in ("ddp", "fsdp2"):
        return ["--multi_gpu", *common]
    if engine.startswith("zero"):
        return ["--use_deepspeed", "--zero_stage", engine[4], *common]
    return common


def environment_for(engine: str) -> dict[str, str]:
    """The variables that a launcher is started with, to train on CPUs whatever the machine has."""
    device = {} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **ENVIRONMENT, **device}


def begin(
    engine: str, processes: int, *command: str, mixed_precision: str = "no", launcher: list[str] | None = None
) -> Ranks:
    """Start ranks in the background."""
    arguments = launcher if launcher is not None else launch_arguments(engine, processes, mixed_precision)
    return Ranks(arguments, processes, command, environment_for(engine))


def begin_truly(
    engine: str, processes: int, *command: str, mixed_precision: str = "no", launcher: list[str] | None = None
) -> subprocess.Popen[str]:
    """Start `accelerate launch ... COMMAND` in the background."""
    arguments = launcher if launcher is not None else launch_arguments(engine, processes, mixed_precision)
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments, *command],
        env=environment_for(engine),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(
    engine: str,
    processes: int,
    *command: str,
    mixed_precision: str = "no",
    launcher: list[str] | None = None,
    timeout: float = 240,
    true_launch: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run COMMAND on the CPU as `accelerate launch` would and return what came of it; never hangs.

    With `true_launch` the real launcher starts new processes, which takes many times as long.
    """
    start = begin_truly if true_launch else begin
    running = start(engine, processes, *command, mixed_precision=mixed_precision, launcher=launcher)
    try:
        stdout, stderr = running.communicate(timeout=timeout)
    finally:
        running.kill()
    assert running.returncode is not None
    return subprocess.CompletedProcess(running.args, running.returncode, stdout, stderr)


def launch_series(
    engine: str,
    processes: int,
    runs: Sequence[Sequence[str]],
    mixed_precision: str = "no",
    launcher: list[str] | None = None,
) -> list[str]:
    """Run `MODULE.main(ARGUMENTS)` for each in one launch, and return what each printed."""
    done = launch(
        engine,
        processes,
        str(ROOT / "tests" / "workers" / "series.py"),
        json.dumps(list(runs)),
        mixed_precision=mixed_precision,
        launcher=launcher,
        timeout=60 + 60 * len(runs),
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.split(END)[: len(runs)]
