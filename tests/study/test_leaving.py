"""What becomes of runs that have been started, with stand-ins for their processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.study import work
from aflora_dist.study.command import main
from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Grid
from aflora_dist.study.results import Results
from tests.study.written import grid_of, write_study


class StandIn:
    """A run that ends when it is told to, or at once with what it says."""

    pid = 2**22 + 1  # beyond those that there are

    def __init__(self, folder: Path, status: int | None) -> None:
        self.folder, self.status = folder, status

    def poll(self) -> int | None:
        if self.status is None and (self.folder / "stop").exists():
            self.status = 0
            (self.folder / "saved").touch()
        return self.status


def starts(behaviour: Callable[[int], tuple[int | None, str]], monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """By its number, from 0 on: the status that a run ends with, and what it says; None: it goes on."""
    started: list[StandIn] = []

    def start(command: list[str], environment: dict[str, str], said: Path) -> Any:
        status, text = behaviour(len(started))
        with said.open("a") as file:
            file.write(text)
        started.append(StandIn(said.parent, status))
        return started[-1]

    monkeypatch.setattr(work, "start_process", start)
    monkeypatch.setattr(work, "_PAUSE", 0.01)
    return started


def work_on(grid: Grid, folder: Path, at_once: int = 1) -> work.Work:
    return work.Work(grid, Results(folder / "results"), folder / "runs", None, at_once)


def test_an_error_has_the_runs_beside_it_save_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, plan, looks = grid_of(tmp_path, methods={"a": {}}), Grid.plan, iter((True, False))
    started = starts(lambda number: (None if number else 1, "no room"), monkeypatch)
    monkeypatch.setattr(work.Work, "_room", lambda self: 2)

    def fails_later(self: Grid, records: Any) -> Any:
        if next(looks):
            return plan(self, records)
        raise AFLoRAError("A file is damaged.")

    monkeypatch.setattr(Grid, "plan", fails_later)
    with pytest.raises(AFLoRAError, match="damaged"):
        work_on(grid, tmp_path, 2).run()
    assert len(started) == 2
    assert (started[1].folder / "saved").exists()


def test_what_an_earlier_attempt_said_is_not_this_one_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends for want of a step's loss, its result is deleted, and the second cannot begin."""
    grid = grid_of(tmp_path, methods={"a": {}}, seeds=[0])
    started = starts(
        lambda n: (2, "a disk is full\n" if n else "aflora: diverged: The loss of step 3 is nan.\n"), monkeypatch
    )
    assert work_on(grid, tmp_path).run()
    (result,) = (tmp_path / "results").iterdir()
    assert "The loss of step 3" in result.read_text()
    result.unlink()
    with pytest.raises(AFLoRAError, match="ended with status 2: a disk is full"):
        work_on(grid, tmp_path).run()
    assert len(started) == 2
    assert (started[0].folder / "printed.txt").read_text().count("\n") == 2


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_no_run_at_once_is_refused(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("study", [str(write_study(tmp_path, methods={"a": {}})), f"--at_once={number}"])
    assert "a whole number above 0 is needed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(AFLoRAError, match="Name another folder with --out"):
        work_on(grid_of(tmp_path, methods={"a": {}}), tmp_path).run()


def test_a_folder_that_takes_no_results_is_told_before_a_run_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = starts(lambda number: (0, ""), monkeypatch)
    studied = work_on(grid_of(tmp_path, methods={"a": {}}, seeds=[0]), tmp_path)
    studied.results.folder = Path("/proc/none")  # where root, too, may write nothing
    with pytest.raises(AFLoRAError, match=r"A run's result could not be written to /proc/.*folder with --results"):
        studied.run()
    assert not begun


def test_a_study_with_a_broken_method_writes_its_tables_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"sweep": {"train.learning_rate": [0.1, 1.0]}}
    sweep = {"seeds": [9], "options": {"data.hold_out": 100}}
    file = write_study(tmp_path, methods={"a": rates}, sweep=sweep, seeds=[0])
    starts(lambda number: (2, "aflora: diverged: The loss of step 3 is nan.\n"), monkeypatch)
    assert main("study", [str(file), "--out", str(tmp_path)]) == 0
    assert "aflora: broken: a on reviews: no value of the sweep" in capsys.readouterr().err
    assert "broken, see below" in (tmp_path / "tables" / "mine.md").read_text()


@pytest.mark.parametrize("file", [".claim", ".lock", "printed.txt"])
def test_a_file_of_a_run_that_cannot_be_written_names_the_option(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the file's place, for root may write anything."""
    grid = grid_of(tmp_path, methods={"a": {}}, seeds=[0])
    (run,) = grid.plan({}).runs()
    (tmp_path / "runs" / run.name / file).mkdir(parents=True)
    monkeypatch.setattr(work, "_PAUSE", 0.01)
    with pytest.raises(
        AFLoRAError, match=rf"A run could not be written to .*{run.name}: Is a directory\. Name another"
    ):
        work_on(grid, tmp_path).run()


def test_a_cut_result_of_a_run_ends_the_study_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_study(tmp_path, methods={"a": {}}, seeds=[0])
    (run,) = Grid(read_study(file)).plan({}).runs()
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    (tmp_path / "runs" / run.name / "result.json").write_text('{"metrics": {')
    assert main("study", [str(file), "--out", str(tmp_path)]) == 2
    assert "result.json cannot be read" in capsys.readouterr().err
