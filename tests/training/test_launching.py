"""A launch that cannot work says so in a line, before anything is read, instead of waiting for ever or a traceback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.utils.cpp_extension
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.file_baton import FileBaton

from aflora_dist import AFLoRAError
from aflora_dist.processes import launched_accelerator, meeting
from aflora_dist.training import compile_lock
from aflora_dist.training.run import main
from tests.launch import MAIN_JOB, environment_for, free_port, launch
from tests.ranks import ROOT
from tests.slurm import submit

RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
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
    "empty, which is as absent": (dict.fromkeys(RANK, ""), "no/such-model"),
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
    "deepspeed alone": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is asked for, but RANK, LOCAL_RANK, WORLD"),
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


class ReachedError(Exception):
    """The accelerator would have been created, with these arguments."""

    @classmethod
    def raised(cls, **arguments: object) -> None:
        raise cls(arguments)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has torch.cuda pretend to see so many, where nothing says that CPUs are meant."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("aflora_dist.processes.launched.Accelerator", ReachedError.raised)
    monkeypatch.setattr(meeting, "meet", lambda: None)  # other ranks are pretended

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def launched_with(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that the accelerator would have been created with."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ReachedError) as reached:
        launched_accelerator()
    return reached.value.args[0]


ON_GPUS = but("ACCELERATE_USE_CPU")


@pytest.mark.parametrize(
    ("ranks", "seen", "refused"), [("2", 1, True), ("3", 2, True), ("2", 2, False), ("1", 1, False)]
)
def test_more_ranks_than_gpus_are_refused(
    ranks: str, seen: int, refused: bool, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would give two ranks the same GPU, and NCCL fail, or wait."""
    gpus(seen)
    variables = ON_GPUS | {"LOCAL_WORLD_SIZE": ranks, "WORLD_SIZE": ranks}
    if not refused:
        assert not launched_with(variables, monkeypatch)["cpu"]
        return
    with pytest.raises(AFLoRAError, match=f"{ranks} ranks .* {seen} GPUs"):
        launched_with(variables, monkeypatch)


@pytest.mark.parametrize("meant", [{"DS_ACCELERATOR": "cpu"}, {"ACCELERATE_USE_CPU": "true"}], ids=str)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_gpus_that_are_not_meant_are_not_used(
    ranks: str,
    meant: dict[str, str],
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus(1)
    arguments = launched_with({**ON_GPUS, **meant, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}, monkeypatch)
    assert arguments["cpu"]
    assert [handler.backend for handler in arguments["kwargs_handlers"]] == ["gloo"] * (ranks == "2")
    assert "warning" not in capsys.readouterr().err


def test_deepspeed_on_cpus_keeps_its_batches_there(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")  # what is set below ends with the test
    arguments = launched_with({**ON_GPUS, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}, monkeypatch)
    assert (arguments["cpu"], os.environ["ACCELERATE_TORCH_DEVICE"]) == (False, "cpu")  # with cpu=True it would be DDP
    assert [handler.backend for handler in arguments["kwargs_handlers"]] == ["gloo"]


# By (CUDA of the build, the driver's device): what is said of training on the CPU.
NOT_SEEN = {
    "no build": (
        None,
        "/dev/nvidia0",
        "/dev/nvidia0.*, but torch .* was built without CUDA. Install a build with CUDA",
    ),
    "no driver": ("13.0", None, "no GPU is seen here. "),
    "old driver": ("13.0", "/dev/nvidia0", "but torch finds none: see what nvidia-smi says; .* too old for CUDA 13.0"),
    "neither": (None, None, None),
}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("case", NOT_SEEN)
def test_a_gpu_that_is_not_used_is_told_of_once(
    case: str,
    rank: str,
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda, driver, expected = NOT_SEEN[case]
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr("aflora_dist.processes.launched.nvidia_driver", lambda: driver)
    launched_with({**ON_GPUS, "RANK": rank, "LOCAL_RANK": rank}, monkeypatch)
    said = capsys.readouterr().err
    if expected is None or rank == "1":
        assert said == ""
    else:
        assert re.search(f"^aflora: warning: training goes on on the CPU: .*{expected}", said)
        assert "Where the CPU is meant, set DS_ACCELERATOR=cpu." in said


def test_gpus_that_are_hidden_are_told_of(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    launched_with({"CUDA_VISIBLE_DEVICES": ""}, monkeypatch)
    assert "no GPU is seen here (CUDA_VISIBLE_DEVICES='')" in capsys.readouterr().err


@pytest.mark.distributed
def test_deepspeed_that_accelerate_leaves_out_is_not_taken_for_ddp(arguments: list[str]) -> None:
    launcher = ["--config_file", str(ROOT / "launch" / "zero2.yaml")]
    done = launch("ddp", 2, *MAIN_JOB, *arguments, launcher=launcher)  # with ACCELERATE_USE_CPU
    assert done.returncode == 2
    assert "DeepSpeed was asked for, but with ACCELERATE_USE_CPU accelerate leaves it out" in done.stderr


# By target of the Makefile: whether its commands see GPUs.
TARGETS = dict.fromkeys(("demo", "test", "test-all", "test-rest", "test-fast", "test-latest"), False)
TARGETS |= {"demo GPUS=2": True, "gpu": True}


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_on_cpus_sees_no_gpu(target: str) -> None:
    made = subprocess.run(["make", "-n", *target.split()], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    run = [line for line in made.replace("\\\n", " ").splitlines() if re.search(r"-m (pytest|profiling|aflora)", line)]
    assert len(run) == 1
    assert ("CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu " not in run[0]) is TARGETS[target]
    assert ("--num_processes 2" in run[0]) is ("GPUS=2" in target)


def test_these_tests_see_no_gpu() -> None:
    for environment in (os.environ, environment_for("ddp"), environment_for("zero2")):
        assert (environment["CUDA_VISIBLE_DEVICES"], environment["DS_ACCELERATOR"]) == ("", "cpu")


@pytest.mark.parametrize(
    ("script", "given", "expected"),
    [
        ("gpu", {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}, "4 unset unset"),
        ("gpu", {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "2"}, "1 unset unset"),
        ("cpu", {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3"}, "3 cpu"),
        ("cpu", {"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "2"}, "2 cpu"),
    ],
)
def test_job_scripts_share_the_node_s_threads_and_hide_gpus_from_cpu_jobs(
    script: str, given: dict[str, str], expected: str, tmp_path: Path
) -> None:
    """With stand-ins for Slurm's commands; tests/training/test_slurm.py submits them to a real one."""
    shown = "$OMP_NUM_THREADS ${DS_ACCELERATOR-unset} ${CUDA_VISIBLE_DEVICES-unset}"
    path, arguments = ROOT / "launch" / "slurm" / f"{script}.sbatch", ["--run.dir", str(tmp_path / "run")]
    done = submit(path, arguments, ROOT, tmp_path, shown, **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == expected


@pytest.mark.parametrize(
    ("given", "array", "started"),
    [
        (["--run.dir", "OUT"], None, "-m aflora_dist.training.run --run.dir OUT --resume"),
        (["examples/with_trl.py", "--out", "OUT"], None, "examples/with_trl.py --out OUT"),
        (["-m", "mine.train", "--run.dir", "OUT"], None, "-m mine.train --run.dir OUT"),
        (["examples/with_trl.py", "--out={seed}"], "1", "examples/with_trl.py --out=7"),
        (["examples/with_trl.py", "--out={seed}"], None, "{seed} stands for the seed"),
        (["examples/with_trl.py", "--out={seed}"], "2", "no element 2: --array=0-1"),
        (["examples/no_such.py"], None, "there is no script examples/no_such.py"),
    ],
)
def test_job_scripts_start_the_main_job_or_a_script_of_one_s_own(
    given: list[str], array: str | None, started: str, tmp_path: Path
) -> None:
    elements = {} if array is None else {"SLURM_ARRAY_TASK_ID": array, "SLURM_ARRAY_JOB_ID": "6", "AFLORA_SEEDS": "3 7"}
    arguments = [word.replace("OUT", str(tmp_path / "run")) for word in given]
    done = submit(ROOT / "launch" / "slurm" / "cpu.sbatch", arguments, ROOT, tmp_path, **elements)
    expected = started.replace("OUT", str(tmp_path / "run"))
    if done.returncode == 0:
        assert done.stdout.splitlines()[-1].endswith(f" bash launch/slurm/node.sh {expected}")
    else:
        assert expected in done.stderr


@pytest.mark.parametrize("element", [0, 3, 4])
def test_an_array_longer_than_its_table_trains_nothing_else(element: int, tmp_path: Path) -> None:
    table = {"AFLORA_SEEDS": "3 7", "AFLORA_PRESETS": "glue/cola glue/rte"}
    elements = {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_JOB_ID": "6", **table}
    arguments = ["--run.dir", str(tmp_path / "run")]
    done = submit(ROOT / "launch" / "slurm" / "cpu.sbatch", arguments, ROOT, tmp_path, **elements)
    assert done.returncode == (2 if element == 4 else 0)
    assert ("no element 4: --array=0-3" in done.stderr) == (element == 4)
    assert ("glue_rte/seed_7" in done.stdout) == (element == 3)


def test_presets_of_an_array_without_seeds_have_the_same_seed(tmp_path: Path) -> None:
    table = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "6", "AFLORA_PRESETS": "glue/cola glue/rte"}
    script, arguments = ROOT / "launch" / "slurm" / "cpu.sbatch", ["--run.dir", str(tmp_path / "run")]
    assert "--train.seed 0 --preset glue/rte" in submit(script, arguments, ROOT, tmp_path, **table).stdout
    table["AFLORA_PRESETS"] = "glue/rte"
    assert "--train.seed 1 --preset glue/rte" in submit(script, arguments, ROOT, tmp_path, **table).stdout


@pytest.mark.parametrize("between", ["\n", " \n\t "])
def test_seeds_and_presets_may_stand_in_lines(between: str, tmp_path: Path) -> None:
    table = {"AFLORA_SEEDS": between.join("37"), "AFLORA_PRESETS": between.join(["glue/cola", "glue/rte"])}
    elements = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "6", **table}
    script, arguments = ROOT / "launch" / "slurm" / "cpu.sbatch", ["--run.dir", str(tmp_path / "run")]
    assert "--train.seed 7 --preset glue/rte" in submit(script, arguments, ROOT, tmp_path, **elements).stdout


@pytest.mark.parametrize(
    ("script", "arguments", "given", "said"),
    [
        ("gpu", [], {"SLURM_GPUS_ON_NODE": "0"}, "launch/slurm/cpu.sbatch"),
        ("gpu", ["-m", "mine"], {"AFLORA_PROCESSES_PER_NODE": "0"}, "AFLORA_PROCESSES_PER_NODE=0"),
        ("cpu", [], {"AFLORA_PROCESSES_PER_NODE": "two"}, "AFLORA_PROCESSES_PER_NODE=two"),
        ("cpu", ["--run.dir="], {}, "--run.dir needs a folder"),
        ("cpu", [], {"SLURM_ARRAY_TASK_ID": "0", "AFLORA_SEEDS": "0,1"}, "AFLORA_SEEDS=0,1"),
        ("cpu", [], {"SLURM_ARRAY_TASK_ID": "0", "AFLORA_PRESETS": "glue/rte, demo"}, "AFLORA_PRESETS=glue/rte, demo"),
    ],
)
def test_job_scripts_start_nothing_that_was_not_meant(
    script: str, arguments: list[str], given: dict[str, str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    done = submit(tmp_path / "launch" / "slurm" / f"{script}.sbatch", arguments, tmp_path, tmp_path / "tools", **given)
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_what_a_site_sources_is_not_given_the_job_s_arguments(tmp_path: Path) -> None:
    """conda's activate would take them for the name of an environment."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "activate").write_text('echo "activated: $*"\n')
    with (tmp_path / "launch" / "slurm" / "site.sh").open("a") as site:
        site.write(". ./activate\n")
    node = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "AFLORA_PROCESSES_PER_NODE": "2", "AFLORA_LAUNCH": "x"}
    node |= {"AFLORA_MAIN_ADDRESS": "here", "AFLORA_MAIN_PORT": "2"}
    submit(tmp_path / "launch" / "slurm" / "node.sh", [], tmp_path, tmp_path / "tools")  # makes the folder
    (tmp_path / "tools" / "accelerate").write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    (tmp_path / "tools" / "accelerate").chmod(0o755)
    arguments = ["-m", "mine", "--out", "a b", ""]
    done = submit(tmp_path / "launch" / "slurm" / "node.sh", arguments, tmp_path, tmp_path / "tools", **node)
    activated, launched = done.stdout.splitlines()
    assert activated == "activated: "
    assert launched.endswith("<-m><mine><--out><a b><>")


@pytest.mark.parametrize(("grace", "finished"), [("1", False), ("1", True), ("60", False)])
def test_ranks_that_look_too_late_are_ended_and_the_job_comes_back(grace: str, finished: bool, tmp_path: Path) -> None:
    """As in a long evaluation, or while the model loads: nobody looks for the request to stop."""
    script, run = ROOT / "launch" / "slurm" / "cpu.sbatch", tmp_path / "run"
    run.mkdir()
    if finished:
        (run / "result.json").touch()
    busy = "$(kill -USR1 $PPID; sleep 3)ranks have ended"
    done = submit(script, ["--run.dir", str(run)], ROOT, tmp_path, busy, AFLORA_GRACE=grace)
    said = [line for line in done.stdout.splitlines() if line in ("here", "ranks have ended")]  # scontrol's, srun's
    requeued = [] if finished else ["here"]
    assert said == [*(requeued if grace == "1" else []), "ranks have ended", *requeued], done.stdout + done.stderr
    assert (run / "stop").exists()


@pytest.mark.parametrize("before", ["echo", "srun", "step="])
def test_a_signal_before_the_ranks_are_waited_for_is_not_lost(before: str, tmp_path: Path) -> None:
    script, at, times = ROOT / "launch" / "slurm" / "cpu.sbatch", tmp_path / "signal.sh", tmp_path / "times"
    once = f'[[ $BASH_COMMAND != {before}* || -e "{times}" ]] || {{ touch "{times}"; kill -USR1 $$; }}'
    at.write_text(f"set -o functrace\ntrap '{once}' DEBUG\n")
    run = tmp_path / "run"
    given = {"BASH_ENV": str(at), "AFLORA_GRACE": "60"}
    done = submit(script, ["--run.dir", str(run)], ROOT, tmp_path, "$(sleep 1)ranks have ended", **given)
    assert done.stdout.splitlines()[1:] == ["ranks have ended", "aflora: job 7 goes back into the queue", "here"]
    assert (run / "stop").exists()


@pytest.mark.parametrize(("left", "grace"), [(None, 100), (60, 100), (1800, 1780), (7200, 100)])
def test_ranks_have_until_the_time_limit_but_not_when_it_is_hours_away(
    left: int | None, grace: int, tmp_path: Path
) -> None:
    """Then the job is preempted, and Slurm says nowhere when that ends."""
    (tmp_path / "sleep").write_text(
        f'#!/bin/sh\n[ "$1" -lt 10 ] && exec /bin/sleep "$1"\necho "$1" >{tmp_path}/slept\n'
    )
    (tmp_path / "sleep").chmod(0o755)
    given = {} if left is None else {"SLURM_JOB_END_TIME": str(int(time.time()) + left)}
    script, arguments = ROOT / "launch" / "slurm" / "cpu.sbatch", ["--run.dir", str(tmp_path / "run")]
    submit(script, arguments, ROOT, tmp_path, "$(kill -USR1 $PPID; sleep 1)", **given)
    assert int((tmp_path / "slept").read_text()) == pytest.approx(grace, abs=5)


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


@pytest.fixture(autouse=True)
def files_are_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch before 2.14."""
    monkeypatch.setattr(torch.utils.cpp_extension, "FileBaton", FileBaton, raising=False)


def test_a_file_that_torch_from_2_14_on_leaves_behind_is_no_lock(lock: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.utils.cpp_extension, "FileBaton")
    lock.forget()
    compile_lock.check_locks(["deepspeed_shm_comm"])


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
    compile_lock.check_locks(["deepspeed_shm_comm"])
    lock.forget()
    compile_lock.check_locks(["cpu_adam"])
    with pytest.raises(AFLoRAError, match="DeepSpeed would wait for ever"):
        compile_lock.check_locks(["deepspeed_shm_comm"])


@pytest.mark.parametrize(("cuda", "own"), [(None, "cpu"), ("13.0", "cu130")])
def test_only_the_folder_that_this_torch_uses_counts(
    cuda: str | None, own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(torch.utils.cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    for other in ("py27_cpu", *(f"{python}_{device}" for device in ("cpu", "cu130", "cu128") if device != own)):
        Lock(tmp_path / other, "cpu_adam").forget()
    compile_lock.check_locks(["cpu_adam"])
    folder = torch.utils.cpp_extension._get_build_directory("another", False)  # type: ignore[attr-defined]
    Lock(Path(folder).parent, "cpu_adam").forget()
    with pytest.raises(AFLoRAError, match=f"{python}_{own}/cpu_adam/lock is left"):
        compile_lock.check_locks(["cpu_adam"])


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
    compile_lock.check_locks(["deepspeed_shm_comm"])
    assert not lock.path.exists()
    assert "waiting for another node" in capsys.readouterr().out


def test_another_node_s_compilation_that_writes_nothing_any_more_is_not(home: Path, lock: Lock) -> None:
    lock.forget()
    long_ago = time.time() - 2 * compile_lock.PATIENCE
    for path in (lock.path, lock.path.parent):
        os.utime(path, (long_ago, long_ago))
    with pytest.raises(AFLoRAError, match="DeepSpeed would wait for ever"):
        compile_lock.check_locks(["deepspeed_shm_comm"])


def test_in_a_folder_of_this_node_alone_nobody_is_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(home / "local"))
    Lock(home / "local").forget()
    with pytest.raises(AFLoRAError, match="DeepSpeed would wait for ever"):
        compile_lock.check_locks(["deepspeed_shm_comm"])
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
