"""A launch that cannot work says so in a line, before anything is read, instead of waiting for ever or a traceback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.utils.cpp_extension
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aflora_dist import AFLoRAError, meeting
from aflora_dist.processes import launched_accelerator
from aflora_dist.training import compile_lock
from aflora_dist.training.run import main
from tests.launch import environment_for, free_port
from tests.ranks import ROOT

RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
WHOLE = {**RANK, **MEETING, "ACCELERATE_USE_CPU": "true"}
NOTHING_IS_READ = ["--model.name", "no/such-model", "--data.task", "files", "--data.train_file", "nowhere.csv"]


def but(*names: str, **changed: str) -> dict[str, str]:
    return {name: value for name, value in {**WHOLE, **changed}.items() if name not in names}


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "no address": (but("MASTER_ADDR", "MASTER_PORT"), "WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT are not set"),
    "world only": ({"WORLD_SIZE": "2"}, "but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
    "no port": (but("MASTER_PORT"), "but MASTER_PORT is not set"),
    "no rank": (but("RANK"), "but RANK is not set"),
    "no local rank": (but("LOCAL_RANK"), "but LOCAL_RANK is not set"),
    "rank too high": (but(RANK="2"), "RANK=2 does not fit to WORLD_SIZE=2: ranks count from 0"),
    "rank alone": ({"RANK": "1"}, "RANK=1 does not fit to WORLD_SIZE=1"),
    "negative": (but(RANK="-1"), "RANK=-1 does not fit"),
    "local rank too high": (but(LOCAL_RANK="2"), "LOCAL_RANK=2 does not fit to LOCAL_WORLD_SIZE=2"),
    "not a number": (but(WORLD_SIZE="two"), "WORLD_SIZE='two' is not a number"),
    "rank not a number": (but(RANK="first"), "RANK='first' is not a number"),
    "address": (but(MASTER_ADDR="no-such-host.invalid"), "MASTER_ADDR=no-such-host.invalid, .* is not a known host"),
    "port": (but(MASTER_PORT="123456"), "MASTER_PORT=123456 is not a port"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, "MPI has started 4 processes .*each of which would train alone"),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 needs a GPU: on a CPU use --mixed_precision bf16"),
    "local rank alone": ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not"),
    "more here than in all": (but(LOCAL_WORLD_SIZE="4"), "LOCAL_WORLD_SIZE=4 is more than WORLD_SIZE=2"),
    "address that is none": (but(MASTER_ADDR="a..b"), "MASTER_ADDR=a..b, .* is not a known host"),
    "fp8": (
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        "mixed precision 'fp8' is not supported: use --mixed_precision bf16",
    ),
    "precision": ({"ACCELERATE_MIXED_PRECISION": "bfloat16"}, "mixed precision 'bfloat16' is not supported"),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "accelerate cannot do .*Megatron.*ACCELERATE_USE_MEGATRON_LM"),
    "truth": ({"ACCELERATE_USE_CPU": "maybe"}, "accelerate cannot do .*maybe.* ACCELERATE_USE_CPU"),
    "deepspeed alone": (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        "DeepSpeed is asked for, but RANK, LOCAL_RANK, WORLD",
    ),
}


def said_by_main(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main([*NOTHING_IS_READ, *more]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aflora: error:")]
    assert len(said) == 1
    assert len(said[0]) < 600
    return said[0]


@pytest.mark.parametrize("case", WRONG)
def test_variables_by_which_ranks_cannot_meet_are_refused(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, expected = WRONG[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert re.search(expected, said_by_main(capsys))


HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("process 1 on node7, Slurm job 7", file=lock, flush=True)
print("held", flush=True)
input()
"""


@pytest.mark.parametrize(
    ("job", "expected"), [("7", "Another task of this same Slurm job is at work"), ("8", "Another job is at work")]
)
def test_tasks_of_one_slurm_job_that_nobody_joins_are_not_taken_for_two_jobs(
    job: str,
    expected: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main(arguments) == 2
        other.communicate("\n")
    assert f"{expected} in {tmp_path}/run: process 1 on node7, Slurm job 7" in capsys.readouterr().err


@pytest.fixture
def fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
def test_a_port_that_another_program_uses_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in but(MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        assert f"127.0.0.1, port {port}, but another program uses that port" in said_by_main(capsys)


@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize(
    ("ranks", "gpus", "refused"), [("2", 1, True), ("3", 2, True), ("2", 2, False), ("1", 1, False)]
)
def test_more_ranks_than_gpus_are_refused(
    ranks: str, gpus: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would give two ranks the same GPU, and NCCL fail, or wait."""
    for name, value in but("ACCELERATE_USE_CPU", LOCAL_WORLD_SIZE=ranks, WORLD_SIZE=ranks).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(meeting, "meet", lambda: None)  # the others are pretended
    monkeypatch.setattr("aflora_dist.processes.Accelerator", ReachedError.raised)
    with pytest.raises(
        AFLoRAError if refused else ReachedError, match=f"{ranks} ranks .* {gpus} GPUs" if refused else None
    ):
        launched_accelerator()


class ReachedError(Exception):
    """The accelerator would have been created."""

    @classmethod
    def raised(cls, **_: object) -> None:
        raise cls


@pytest.mark.parametrize(("asked", "warned"), [({}, True), ({"DS_ACCELERATOR": "cpu"}, False)])
def test_a_gpu_that_is_not_seen_is_told_of(
    asked: dict[str, str], warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"CUDA_VISIBLE_DEVICES": "", **asked}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("aflora_dist.processes.Accelerator", ReachedError.raised)
    with pytest.raises(ReachedError):
        launched_accelerator()
    assert ("no GPU is seen here (CUDA_VISIBLE_DEVICES='')" in capsys.readouterr().err) is warned


class Lock:
    """The lock of a compilation, as torch takes it."""

    def __init__(self, home: Path, op: str = "deepspeed_shm_comm") -> None:
        self.path = home / op / "lock"
        self.path.parent.mkdir(parents=True)
        self.file = os.open(self.path, os.O_CREAT | os.O_EXCL)

    def forget(self) -> None:
        """As a process does that is killed."""
        os.close(self.file)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lock:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return Lock(tmp_path)


def test_a_lock_of_an_interrupted_compilation_is_named(
    lock: Lock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock.forget()
    for name, value in {**but("ACCELERATE_USE_CPU"), "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "part", lambda reason, stay: None)  # the other rank is pretended
    said = said_by_main(capsys)
    assert f"{lock.path} is left of a compilation" in said
    assert f"rm -r {lock.path.parent}" in said


def test_a_lock_that_is_held_or_of_an_op_that_is_not_needed_is_left_alone(lock: Lock) -> None:
    compile_lock.check(["deepspeed_shm_comm"])
    lock.forget()
    compile_lock.check(["cpu_adam"])
    with pytest.raises(AFLoRAError, match="DeepSpeed would wait for ever"):
        compile_lock.check(["deepspeed_shm_comm"])


@pytest.mark.parametrize(("cuda", "own"), [(None, "cpu"), ("13.0", "cu130")])
def test_only_the_folder_that_this_torch_uses_counts(
    cuda: str | None, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for module in (compile_lock, torch.utils.cpp_extension):
        monkeypatch.setattr(module, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    for other in ("py27_cpu", *(f"{python}_{device}" for device in ("cpu", "cu130", "cu128") if device != own)):
        Lock(tmp_path / other, "cpu_adam").forget()
    compile_lock.check(["cpu_adam"])
    folder = torch.utils.cpp_extension._get_build_directory("another", False)  # type: ignore[attr-defined]
    Lock(Path(folder).parent, "cpu_adam").forget()
    with pytest.raises(AFLoRAError, match=f"{python}_{own}/cpu_adam/lock is left"):
        compile_lock.check(["cpu_adam"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a file system that other nodes see, too."""
    mounts = [("/", "overlay"), (str(tmp_path), "nfs4"), (f"{tmp_path}/local", "ext4")]
    found = [SimpleNamespace(mountpoint=at, fstype=kind) for at, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    return tmp_path


def test_another_node_s_compilation_is_waited_for_while_it_writes(
    home: Path, lock: Lock, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that nodes share its process is not seen here, whether it is of this job or of another."""
    lock.forget()
    done = threading.Timer(2.5, lock.path.unlink)
    done.start()
    compile_lock.check(["deepspeed_shm_comm"])
    assert not lock.path.exists()
    assert "waiting for another node" in capsys.readouterr().out


def test_another_node_s_compilation_that_writes_nothing_any_more_is_not(home: Path, lock: Lock) -> None:
    lock.forget()
    long_ago = time.time() - 2 * compile_lock.PATIENCE
    for path in (lock.path, lock.path.parent):
        os.utime(path, (long_ago, long_ago))
    with pytest.raises(AFLoRAError, match="DeepSpeed would wait for ever"):
        compile_lock.check(["deepspeed_shm_comm"])


def test_in_a_folder_of_this_node_alone_nobody_is_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(home / "local"))
    Lock(home / "local").forget()
    with pytest.raises(AFLoRAError, match="DeepSpeed would wait for ever"):
        compile_lock.check(["deepspeed_shm_comm"])
    assert "waiting" not in capsys.readouterr().out


# What Python does last of all, long after exit handlers: here it aborts, as gloo's threads sometimes make it do.
ABORTS = """
import atexit, ctypes, os
if "RANK" in os.environ:
    ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).abort)
    atexit.register(lambda: open(os.environ["RANK"] + ".exit_handlers", "w").close())
"""


@pytest.fixture
def aborting(tmp_path: Path) -> dict[str, str]:
    """Variables under which every rank aborts when its interpreter is taken down."""
    (tmp_path / "sitecustomize.py").write_text(ABORTS)
    variables = but(MASTER_PORT=str(free_port()), PYTHONPATH=f"{tmp_path}:{ROOT}", PYTHONUNBUFFERED="")
    return environment_for("ddp") | variables


@pytest.mark.parametrize("status", [0, 2, 3])
def test_the_exit_status_is_the_program_s_own_however_python_ends(
    status: int, aborting: dict[str, str], tmp_path: Path
) -> None:
    def run(module: str, call: str) -> int:
        command = [sys.executable, "-c", f"import {module}; print('said'); {module}.{call}({status})"]
        done = subprocess.run(command, env=aborting, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == "said\n"
        assert (tmp_path / "0.exit_handlers").exists()
        (tmp_path / "0.exit_handlers").unlink()
        return done.returncode

    assert run("sys", "exit") == -signal.SIGABRT
    assert run("aflora_dist.training.run", "leave") == status


@pytest.mark.distributed
def test_nothing_is_lost_when_a_rank_leaves(aborting: dict[str, str], arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aflora_dist.training.run", *arguments]
    pipe = subprocess.PIPE
    start = partial(subprocess.Popen, command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    ranks = [start(env=aborting | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert all((tmp_path / f"{rank}.exit_handlers").exists() for rank in "01")
    assert "accuracy" in said[0][0]  # printed last of all, into a pipe
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 12
