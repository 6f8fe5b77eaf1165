"""The shipped Slurm scripts on a real Slurm of two nodes: they end, come back, and give the same model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.runs import assert_same_to_the_bit, command, lines, options, start_all
from tests.slurm import SlurmCluster

pytestmark = pytest.mark.distributed
EPOCHS = 150  # long enough to be caught in the act


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    search = os.environ["PATH"] + ":/usr/sbin"
    if not all(shutil.which(program, path=search) for program in ("slurmctld", "slurmd", "sbatch")):
        pytest.skip("needs Slurm (Debian: slurmctld, slurmd)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: Slurm puts sockets into it
    with SlurmCluster(folder / "s") as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


class Job:
    """One job (or array) of the shipped script for nodes without GPUs."""

    def __init__(
        self, cluster: SlurmCluster, out: Path, sbatch: list[str], arguments: Sequence[str | Path], **env: str
    ) -> None:
        self.cluster, self.out = cluster, out
        tools = str(Path(sys.executable).parent)
        cluster.env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        cluster.env |= {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={out}", "--cpus-per-task=1", *sbatch]
        self.id = cluster.run(*command, "launch/slurm/cpu.sbatch", *map(str, arguments), cwd=ROOT).strip()

    def said(self) -> str:
        return "".join(
            path.read_text(errors="replace") for path in sorted(self.out.parent.glob(self.out.name.replace("%a", "*")))
        )

    def state(self) -> str:
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", self.id, "-o", "%T").strip()

    def wait(self, condition: Callable[[], bool], seconds: float = 500) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.state()}\n{self.said()}"
            time.sleep(0.2)

    def ended(self) -> bool:
        return set(self.state().split()) <= {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}

    def wait_for_end(self) -> None:
        self.wait(self.ended)
        assert set(self.state().split()) == {"COMPLETED"}, self.said()


@pytest.fixture(scope="module")
def submit(
    cluster: SlurmCluster, tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Job, Path]]:
    """(launch configuration, options of sbatch) -> a job on two nodes and its run's directory.

    Evaluating one by one, and saving always, change no bit and make the run last longer.
    """

    def submit(launch: str, *sbatch: str) -> tuple[Job, Path]:
        folder = tmp_path_factory.mktemp("job")
        more = {"train.epochs": EPOCHS, "run.keep": 2, "train.eval_batch_size": 1, "run.save_every": 1}
        arguments = options(folder / "run", tiny_model, reviews, **more)
        job = Job(cluster, folder / "out.txt", ["--nodes=2", *sbatch], arguments, AFLORA_LAUNCH=f"launch/{launch}.yaml")
        return job, folder / "run"

    return submit


def wait_for_updates(job: Job, folder: Path, starts: int) -> None:
    """Until the job has done some updates after so many starts."""
    job.wait(lambda: job.said().count("Going on after step") == starts - 1 and (folder / "metrics.jsonl").exists())
    done = len(lines(folder, "metrics.jsonl"))
    job.wait(lambda: len(lines(folder, "metrics.jsonl")) > done + 20)


def test_a_job_interrupted_in_three_ways_comes_back_and_ends_with_the_same_model(
    submit: Callable[..., tuple[Job, Path]], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """As two ranks of one machine that nobody interrupts. DDP starts much faster than DeepSpeed."""
    # A limit of a minute, the signal 55 s ahead, the same as ahead of a preemption; Slurm looks every 30 s.
    job, folder = submit("ddp", "--time=1", "--signal=B:USR1@55")
    job.wait(lambda: "goes back into the queue" in job.said() or job.ended())
    assert "Stopped as asked" in job.said(), "make EPOCHS larger if the run ended before its time limit's signal"
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=60")  # once is enough
    wait_for_updates(job, folder, starts=2)
    assert job.said().count("goes back into the queue") == job.said().count("Stopped as asked") == 1
    job.cluster.run("scontrol", "requeue", job.id)
    wait_for_updates(job, folder, starts=3)
    job.cluster.run("scontrol", "update", "nodename=127.0.0.3", "state=down", "reason=test")
    job.wait(lambda: job.state() == "PENDING")
    job.cluster.run("scontrol", "update", "nodename=127.0.0.3", "state=resume")
    job.wait_for_end()
    assert "start 4, 2 node(s)" in job.said()
    quick = {"train.epochs": EPOCHS, "run.save_every": 0}
    start_all("ddp", [options(tmp_path / "undisturbed", tiny_model, reviews, **quick)])
    assert_same_to_the_bit(folder, tmp_path / "undisturbed")


def test_a_signal_to_the_ranks_saves_and_ends_the_job(submit: Callable[..., tuple[Job, Path]]) -> None:
    """No requeue was asked for."""
    job, folder = submit("zero2")
    wait_for_updates(job, folder, starts=1)
    assert "start 1, 2 node(s)" in job.said()
    job.cluster.run("scancel", "--signal=USR1", job.id)
    job.wait_for_end()
    assert "Stopped as asked" in job.said()
    assert not (folder / "result.json").exists()


def test_several_tasks_a_node_are_so_many_ranks_and_a_port_in_use_is_passed_over(
    cluster: SlurmCluster, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """One launcher a node starts them: two would take each other for another job in the same directory."""
    arguments = options(tmp_path / "run", tiny_model, reviews)
    sbatch = ["--nodes=2", "--ntasks-per-node=2", "--hold"]
    job = Job(cluster, tmp_path / "out.txt", sbatch, arguments, AFLORA_LAUNCH="launch/ddp.yaml")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 20000 + int(job.id) * 10 % 20000))  # what job.sh tries first
        other.listen()
        cluster.run("scontrol", "release", job.id)
        job.wait_for_end()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 4


def test_an_array_of_seeds_is_collected_into_a_table(
    cluster: SlurmCluster, tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect = command("collect")

    arguments = options(tmp_path / "table", tiny_model, reviews)
    variables = {"AFLORA_SEEDS": "3 5", "AFLORA_LAUNCH": "launch/cpu.yaml"}
    job = Job(cluster, tmp_path / "out-%a.txt", ["--array=0-1"], arguments, **variables)
    job.wait_for_end()
    results = [json.loads((tmp_path / "table" / f"seed_{seed}" / "result.json").read_text()) for seed in (3, 5)]
    first, second = (result["metrics"]["accuracy"] for result in results)
    assert collect([str(tmp_path / "table"), "--json", str(tmp_path / "table.json")]) == 0
    row, other = json.loads((tmp_path / "table.json").read_text())
    assert (row["metric"], other["metric"]) == ("accuracy", "f1")
    assert row["seeds"] == 2
    assert row["mean"] == pytest.approx((first + second) / 2)
    assert row["deviation"] == pytest.approx(abs(first - second) / 2**0.5)
    assert f"{row['mean']:.4f}" in capsys.readouterr().out


# Waits to be interrupted the first time, and says who it is the second. Its neighbour of the array says if it was, too.
OWN = """
import signal, sys, time
from pathlib import Path
from accelerate import PartialState

ranks = PartialState(cpu=True, backend="gloo")
seed, out = int(sys.argv[1]), Path(sys.argv[2])
saved = out / f"saved_{ranks.process_index}"
if seed % 2 and not saved.exists():
    signal.signal(signal.SIGUSR1, lambda *_: (saved.write_text(""), sys.exit(1)))
    (out / f"ready_{ranks.process_index}").write_text("")
    time.sleep(300)
if seed % 2 == 0:
    signal.signal(signal.SIGUSR1, lambda *_: (out / "disturbed").write_text(""))
    end = time.monotonic() + 120
    while time.monotonic() < end and not all((out / f"saved_{rank}").exists() for rank in (0, 1)):
        time.sleep(0.2)
    time.sleep(2)
(out / f"done_{seed}_{ranks.process_index}").write_text(str(ranks.num_processes))
"""


def test_a_script_of_one_s_own_runs_on_all_nodes_and_comes_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    """An array: the second element is interrupted, saves on every rank, and goes on after its requeue."""
    script = tmp_path / "own.py"
    script.write_text(OWN)
    variables = {"AFLORA_SEEDS": "2 5", "AFLORA_LAUNCH": "launch/ddp.yaml"}
    job = Job(cluster, tmp_path / "out-%a.txt", ["--nodes=2", "--array=0-1"], [script, "{seed}", tmp_path], **variables)
    job.wait(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job.id}_1")
    job.wait_for_end()
    assert all((tmp_path / f"done_{seed}_{rank}").read_text() == "2" for seed in (2, 5) for rank in (0, 1))
    assert all((tmp_path / f"saved_{rank}").exists() for rank in (0, 1))
    assert not (tmp_path / "disturbed").exists()
    assert "start 2, 2 node(s), " + str(script) in job.said()
