"""Studies of real runs on tiny data: killed, shared, from results alone; always the same table to the digit."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aflora_dist.study import work
from aflora_dist.study.cells import cells, compared
from aflora_dist.study.command import main
from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Grid
from aflora_dist.study.results import Results
from aflora_dist.view.collect import groups
from tests.launch import ROOT, begin
from tests.ranks import Ranks
from tests.slurm import SlurmCluster

pytestmark = pytest.mark.distributed


def write_tiny_study(folder: Path, model: Path, reviews: Path, **more: Any) -> Path:
    """Two tasks, two methods, two seeds: each run has 12 updates and a checkpoint after every other."""
    task = {"data.task": "files", "data.train_file": str(reviews / "train.csv"), "metric": "accuracy"}
    task["data.validation_file"] = str(reviews / "dev.csv")
    said = {
        "tasks": {"long": task, "short": {**task, "data.max_length": 8}},
        "methods": {"adaptive": {}, "lora": {"method.name": "lora", "method.options": {"r": 2}}},
        "seeds": [0, 1],
        "compare": [["adaptive", "lora"]],
        "settings": {
            "model.name": str(model),
            "run.trackers": [],
            "run.save_every": 2,
            "run.log_every": 1,
            "train.epochs": 2,
            "train.batch_size": 16,
            "freezing.initial_epochs": 0.5,
            "freezing.final_epochs": 0.5,
            **more,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(said))
    return folder / "tiny.yaml"


def without_times(folder: Path, file: Path) -> tuple[Any, ...]:
    """What the tables say, but for how long things took."""
    grid, records = Grid(read_study(file)), Results(folder).records
    found = cells(grid, records)
    said = [(c.task, c.method, c.values, c.best, c.failed, c.missing, c.trained) for c in found]
    return said, compared(grid, found)


class Starts:
    """Starts runs as ranks forked from a warm process, and counts them; what `hook` does comes after each start."""

    def __init__(self, hook: Callable[[Starts, Ranks, Path], None] | None = None) -> None:
        self.counted: Counter[str] = Counter()
        self.hook = hook

    def __call__(self, command: list[str], environment: dict[str, str], said: Path) -> Any:
        assert command[:3] == [sys.executable, "-m", "aflora_dist.training.run"]
        self.counted[said.parent.name] += 1
        job = begin("single", 1, *command[1:])
        if self.hook is not None:
            self.hook(self, job, said.parent)
        said.touch()
        return job


def at_step(folder: Path, step: int) -> bool:
    return any(path.name >= f"step_{step:08d}" for path in folder.glob("checkpoints/step_*"))


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[Any, ...], Path]:
    """The study's file, what its tables say where nobody disturbs it, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = write_tiny_study(folder, tiny_model, reviews)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "start_process", starts := Starts())
        assert main("study", [str(file), "--out", str(folder), "--at_once", "2"]) == 0
    assert [*starts.counted.values()] == [1] * 8
    return file, without_times(folder / "results", file), folder


def test_a_study_that_is_killed_goes_on_and_ends_with_the_same_table(
    undisturbed: tuple[Path, tuple[Any, ...], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, expected, _ = undisturbed

    def kill_the_third(starts: Starts, job: Ranks, folder: Path) -> None:
        if sum(starts.counted.values()) == 3:
            while not at_step(folder, 4):
                assert job.poll() is None, job.output()
                time.sleep(0.01)
            job.send_signal(signal.SIGKILL, 0)

    monkeypatch.setattr(work, "start_process", starts := Starts(kill_the_third))
    command = [str(file), "--out", str(tmp_path)]
    assert main("study", command) == 2
    assert "ended with status -9" in capsys.readouterr().err
    (killed,) = (path for path in (tmp_path / "runs").iterdir() if not (path / "result.json").exists())
    assert main("study", [*command, "--dry_run"]) == 0
    assert "6 of 8 runs to do" in capsys.readouterr().out
    assert main("study", command) == 0
    assert starts.counted.pop(killed.name) == 2
    assert [*starts.counted.values()] == [1] * 7
    assert without_times(tmp_path / "results", file) == expected
    assert not [*tmp_path.glob("runs/*/checkpoints")]


def test_from_results_alone_nothing_is_run_again_and_a_changed_setting_is_another_run(
    undisturbed: tuple[Path, tuple[Any, ...], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, expected, folder = undisturbed
    shutil.copytree(folder / "results", tmp_path / "results")
    monkeypatch.setattr(work, "start_process", starts := Starts())
    assert main("study", [str(file), "--out", str(tmp_path)]) == 0
    assert not starts.counted
    assert without_times(tmp_path / "results", file) == expected
    written = {path.name for path in (tmp_path / "tables").iterdir()}
    assert {"tiny.md", "tiny.tex", "tiny.csv", "tiny_differences.csv", "tiny_differences.png"} <= written
    more = ["--tasks", "long", "--methods", "lora", "--seeds", "0", "--train.learning_rate", "0.002"]
    assert main("study", [str(file), "--out", str(tmp_path), *more]) == 0
    assert [*starts.counted.values()] == [1]
    assert "all 1 runs are done" not in capsys.readouterr().out


def test_a_run_that_another_is_at_is_left_to_it(
    undisturbed: tuple[Path, tuple[Any, ...], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, *_ = undisturbed
    grid = Grid(read_study(file))
    first, *_ = grid.plan({}).runs()
    monkeypatch.setattr(work, "try_lock", lambda file: False)
    monkeypatch.setattr(work, "start_process", starts := Starts())
    assert not work.Work(grid, Results(tmp_path / "results"), tmp_path)._begin(first)
    assert not starts.counted


def test_a_request_to_leave_has_runs_save_and_the_study_says_that_some_are_left(
    tiny_model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_tiny_study(tmp_path, tiny_model, reviews, **{"train.epochs": 60})

    def ask(starts: Starts, job: Ranks, folder: Path) -> None:
        while not at_step(folder, 2):
            assert job.poll() is None, job.output()
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(work, "start_process", Starts(ask))
    assert main("study", [str(file), "--out", str(tmp_path)]) == 3
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if (path / "config.yaml").exists())
    assert at_step(folder, 2)
    assert not (folder / "result.json").exists()


def test_a_run_that_breaks_down_is_counted_and_one_that_cannot_begin_ends_the_study(
    tiny_model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_tiny_study(tmp_path, tiny_model, reviews)

    class Said(Starts):
        def __call__(self, command: list[str], environment: dict[str, str], said: Path) -> Any:
            job = super().__call__(command, environment, said)
            job.wait()
            said.write_text("".join(job.output()))
            return job

    monkeypatch.setattr(work, "start_process", Said())
    one = ["--tasks", "long", "--methods", "lora", "--seeds", "0", "--out", str(tmp_path)]
    assert main("study", [str(file), *one, "--train.learning_rate", "1e30"]) == 0
    (result,) = Results(tmp_path / "results").records.values()
    assert "is nan" in result["failed"] or "not finite" in result["failed"]
    table = tmp_path / "tables" / "tiny_long_lora_seed0_train.learning_rate=1e30.md"
    assert "| 0 (1 diverged) |" in table.read_text()
    capsys.readouterr()
    assert main("study", [str(file), *one, "--model.name", "/nowhere"]) == 2
    said = capsys.readouterr().err
    assert "lora on long, seed 0, ended with status 2" in said
    assert "/nowhere" in said


def test_collect_reads_a_study_s_folder(undisturbed: tuple[Path, tuple[Any, ...], Path]) -> None:
    _, _, folder = undisturbed
    found = groups(folder / "runs", [])
    assert [len(entry.runs) for entry in found] == [2, 2, 2, 2]


@pytest.mark.whole
@pytest.mark.timeout(1800)
def test_an_array_of_jobs_shares_a_study_and_a_killed_one_is_made_up_for(
    undisturbed: tuple[Path, tuple[Any, ...], Path], tmp_path: Path
) -> None:
    if not all(
        shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in ("slurmctld", "slurmd", "sbatch")
    ):
        pytest.skip("needs Slurm (Debian: slurmctld, slurmd)")
    file, expected, _ = undisturbed
    out, folder = tmp_path / "out", Path(tempfile.mkdtemp(prefix="slurm-"))  # short: Slurm puts sockets into it
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nexec {sys.executable} -m aflora_dist.cli study {file} --out {out}\n")
    with SlurmCluster(folder / "s") as cluster:
        cluster.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

        def submit() -> str:
            options = ["--parsable", "--array=0-1", f"--output={tmp_path}/%A_%a.txt", f"--chdir={ROOT}", str(script)]
            return cluster.run("sbatch", *options).strip()

        def states(job: str) -> list[str]:
            return cluster.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()

        job = submit()
        cluster.wait_until(lambda: len([*out.glob("results/*.json")]) >= 2, timeout=500)
        cluster.run("scancel", "--signal=KILL", f"{job}_1")
        cluster.wait_until(lambda: {*states(job)} <= {"COMPLETED", "CANCELLED", "FAILED"}, timeout=600)
        second = submit()  # whatever the killed one has left
        cluster.wait_until(lambda: {*states(second)} == {"COMPLETED"}, timeout=600)
    shutil.rmtree(folder, ignore_errors=True)
    assert without_times(out / "results", file) == expected
    begun = [path.read_text().count("Fine-tuning ") for path in out.glob("runs/*/printed.txt")]
    assert len(begun) == 8
    assert sorted(begun)[:7] == [1] * 7  # but for the one that was killed
