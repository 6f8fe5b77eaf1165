"""Runs of the main job on the small model, and what is read from their directories."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aflora_dist import cli
from aflora_dist.training.run import main
from tests.launch import MAIN_JOB, begin, free_port, launch, launch_series
from tests.ranks import Ranks


def command(name: str) -> Callable[[list[str]], int]:
    """`aflora NAME ...` in this process; what is called returns the exit status."""
    return lambda words: cli.run([name, *words])


def command_line(chosen: dict[str, Any]) -> list[str]:
    return [part for key, value in chosen.items() for part in (f"--{key}", str(value))]


def options(folder: Path, model: Path, data: Path, **more: Any) -> list[str]:
    """Command line of a run of 24 updates of AFLoRA's, which freezes in them."""
    schedule = {"freezing.initial_epochs": 0.5, "freezing.final_epochs": 1}
    return options_of_any(folder, model, data, **schedule | more)


def options_of_any(folder: Path, model: Path, data: Path, **more: Any) -> list[str]:
    """The same for any method: nothing is said of freezing."""
    chosen = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.save_every": 5,
        "run.keep": 100,
        "run.tensorboard": False,
        "model.name": model,
        "data.task": "files",
        "data.train_file": data / "train.csv",
        "data.validation_file": data / "dev.csv",
        "train.epochs": 4,
        "train.batch_size": 16,
        **more,
    }
    return command_line(chosen)


def start(engine: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The main job on two ranks, or in this process ("single")."""
    if engine != "single":
        return launch(engine, 2, *MAIN_JOB, *arguments)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start_all(engine: str, runs: list[list[str]]) -> list[str]:
    """The main job with each of these command lines, in one launch; what each printed.

    "x4": on four ranks; "offload": ZeRO-3 with CPU Adam. Only the main process may read checkpoints.
    """
    if engine == "single":
        done = [start(engine, arguments) for arguments in runs]
        assert [d.returncode for d in done] == [0] * len(done), [d.stderr for d in done]
        return [d.stdout for d in done]
    worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
    series = [[*worker, "tests.workers.one_reader", *arguments] for arguments in runs]
    if engine == "offload":
        launcher = ["--config_file", "launch/zero3_offload.yaml", "--num_processes", "2"]
        return launch_series("zero3", 2, series, launcher=[*launcher, "--main_process_port", str(free_port())])
    return launch_series(engine.removesuffix("x4"), 4 if engine.endswith("x4") else 2, series)


def begin_job(engine: str, arguments: list[str]) -> Ranks:
    """The main job on two ranks, or on one ("single"), in the background."""
    return begin(engine, 1 if engine == "single" else 2, *MAIN_JOB, *arguments)


def wait_for(condition: Callable[[], bool], job: Ranks | subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until something holds that a job does before its end."""
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def freezes(folder: Path) -> list[tuple[int, list[str]]]:
    return [(event["step"], event["frozen"]) for event in lines(folder, "freeze_log.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_to_the_bit(ours: Path, undisturbed: Path) -> None:
    """Losses, freeze log with scores, evaluations, weights."""
    assert [m["loss"] for m in lines(ours, "metrics.jsonl")] == [m["loss"] for m in lines(undisturbed, "metrics.jsonl")]
    logs = [[{**e, "rebuild_seconds": 0} for e in lines(f, "freeze_log.jsonl")] for f in (ours, undisturbed)]
    assert logs[0] == logs[1]
    results = [json.loads((f / "result.json").read_text()) for f in (ours, undisturbed)]
    for key in ("evaluations", "steps", "avg_trainable_params"):
        assert results[0][key] == results[1][key]
    mine, theirs = weights(ours), weights(undisturbed)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
