"""Starts real processes through `accelerate launch`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.workers.series import END

ENGINES = ("ddp", "zero1", "zero2", "zero3")
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def launch_arguments(engine: str, processes: int, mixed_precision: str = "no") -> list[str]:
    common = ["--num_processes", str(processes), "--num_machines", "1", "--dynamo_backend", "no"]
    common += ["--mixed_precision", mixed_precision, "--main_process_port", str(free_port())]
    if engine == "ddp":
        return ["--multi_gpu", *common]
    if engine.startswith("zero"):
        return ["--use_deepspeed", "--zero_stage", engine[4], *common]
    return common


def launch(
    engine: str,
    processes: int,
    *command: str,
    mixed_precision: str = "no",
    launcher: list[str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch ... COMMAND` on the CPU and return what came of it; never hangs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = launcher if launcher is not None else launch_arguments(engine, processes, mixed_precision)
    if engine.startswith("zero"):
        environment.pop("ACCELERATE_USE_CPU")
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch_series(
    engine: str,
    processes: int,
    runs: Sequence[Sequence[str]],
    mixed_precision: str = "no",
    launcher: list[str] | None = None,
) -> list[str]:
    """Run `MODULE.main(ARGUMENTS)` for each in one launch, and return what each printed."""
    worker = str(ROOT / "tests" / "workers" / "series.py")
    options: dict[str, Any] = {"mixed_precision": mixed_precision, "launcher": launcher}
    done = launch(engine, processes, worker, json.dumps(list(runs)), timeout=60 + 60 * len(runs), **options)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.split(END)[: len(runs)]
