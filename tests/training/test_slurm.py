"""The shipped Slurm scripts on a real Slurm of two nodes: they end, come back, and give the same model."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT
from tests.slurm import SlurmCluster

from .test_resume import assert_same_to_the_bit, lines, options

pytestmark = pytest.mark.distributed
EPOCHS = 60  # long enough to be caught in the act


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

    def __init__(self, cluster: SlurmCluster, out: Path, sbatch: list[str], arguments: list[str], **env: str) -> None:
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
        self.id = cluster.run(*command, "launch/slurm/cpu.sbatch", *arguments, cwd=ROOT).strip()

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
    def submit(*sbatch: str, **more: Any) -> tuple[Job, Path]:
        folder = tmp_path_factory.mktemp("job")
        common = {"train.epochs": EPOCHS, "run.keep": 2, "data.validation_file": reviews / "train.csv"}
        arguments = options(folder / "run", tiny_model, reviews, **{**common, **more})
        return Job(cluster, folder / "out.txt", ["--nodes=2", *sbatch], arguments), folder / "run"

    return submit


@pytest.fixture(scope="module")
def undisturbed(submit: Callable[..., tuple[Job, Path]]) -> Path:
    """The run directory of a two-node ZeRO-2 job that nobody interrupts."""
    job, folder = submit()
    job.wait_for_end()
    assert "start 1, 2 node(s)" in job.said()
    assert json.loads((folder / "result.json").read_text())["engine"] == "zero2"
    assert json.loads((folder / "result.json").read_text())["world_size"] == 2
    return folder


def wait_for_updates(job: Job, folder: Path, starts: int) -> None:
    """Until the job has done some updates after so many starts."""
    job.wait(lambda: job.said().count("Going on after step") == starts - 1 and (folder / "metrics.jsonl").exists())
    done = len(lines(folder, "metrics.jsonl"))
    job.wait(lambda: len(lines(folder, "metrics.jsonl")) > done + 20)


def test_a_job_interrupted_three_times_comes_back_and_ends_with_the_same_model(
    submit: Callable[..., tuple[Job, Path]], undisturbed: Path
) -> None:
    job, folder = submit()
    wait_for_updates(job, folder, starts=1)
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # as ahead of a preemption
    wait_for_updates(job, folder, starts=2)
    assert "Stopped as asked" in job.said()
    assert "goes back into the queue" in job.said()
    job.cluster.run("scontrol", "requeue", job.id)
    wait_for_updates(job, folder, starts=3)
    job.cluster.run("scontrol", "update", "nodename=127.0.0.3", "state=down", "reason=test")
    job.wait(lambda: job.state() == "PENDING")
    job.cluster.run("scontrol", "update", "nodename=127.0.0.3", "state=resume")
    job.wait_for_end()
    assert "start 4, 2 node(s)" in job.said()
    assert_same_to_the_bit(folder, undisturbed)


def test_a_signal_to_the_ranks_saves_and_ends_the_job(submit: Callable[..., tuple[Job, Path]]) -> None:
    """No requeue was asked for."""
    job, folder = submit()
    wait_for_updates(job, folder, starts=1)
    job.cluster.run("scancel", "--signal=USR1", job.id)
    job.wait_for_end()
    assert "Stopped as asked" in job.said()
    assert not (folder / "result.json").exists()


def test_a_job_at_its_time_limit_comes_back(submit: Callable[..., tuple[Job, Path]], undisturbed: Path) -> None:
    """A limit of a minute, the signal 55 s ahead; Slurm looks every 30 s. What changes no bit makes it last longer."""
    job, folder = submit("--time=1", "--signal=B:USR1@55", **{"train.eval_batch_size": 1, "run.save_every": 1})
    job.wait(lambda: "goes back into the queue" in job.said() or job.ended())
    job.cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=60")  # once is enough
    job.wait_for_end()
    if "start 2" not in job.said():
        pytest.fail(f"the run ended before its time limit's signal: make EPOCHS larger\n{job.said()}")
    assert "Stopped as asked" in job.said()
    assert_same_to_the_bit(folder, undisturbed)


def test_an_array_of_seeds_is_collected_into_a_table(
    cluster: SlurmCluster, tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from aflora_dist.view.collect import main as collect

    arguments = options(tmp_path / "table", tiny_model, reviews)
    job = Job(cluster, tmp_path / "out-%a.txt", ["--array=0-1"], arguments, AFLORA_SEEDS="3 5")
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
