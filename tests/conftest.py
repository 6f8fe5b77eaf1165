"""Fixtures and the no-skip rule of continuous integration."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.launch import MAIN_JOB, launch
from tests.runs import command_line, options, start_all
from tests.selection import CHOSEN, COLLECTED, is_left_out
from tests.small import make_tiny_model, write_reviews

torch.set_num_threads(1)  # small models; two threads would wait for each other where something else is at work
# Files that wait for minutes, Slurm's for its clocks: begun last, they would leave the other process idle at the end.
WAITING = ("test_slurm.py", "test_work.py")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """What is tested here runs on CPUs, whatever the machine has; only `pytest -m gpu` sees its GPUs."""
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves out, before pytest looks at the marks that it was asked for.

    Where files are dealt out to several processes, those come first that wait longest, then those that start ranks.
    """
    if not COLLECTED:  # a test may collect others
        COLLECTED.extend(item.nodeid for item in items)
    for item in items:
        if is_left_out(item.nodeid):
            item.add_marker("whole")
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("distributed")}
        items.sort(key=lambda item: (item.path.name not in WAITING, item.path not in long))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not CHOSEN:
        CHOSEN.update(item.nodeid for item in session.items)


@pytest.fixture(autouse=True, scope="module")
def own_settings_of_accelerate() -> Iterator[None]:
    """What a module's tests have set in accelerate's singletons (compiling, Trainer's accumulation) ends with it."""
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


@pytest.fixture
def glue() -> Path:
    """A folder of real GLUE TSV files, where one lies beside the checkout."""
    folder = SHARED / "glue"
    if not folder.is_dir():
        pytest.skip("no folder of GLUE's TSV files beside the checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv (100 rows) and dev.csv (33 rows: not a multiple of anything)."""
    folder = tmp_path_factory.mktemp("reviews")
    write_reviews(folder / "train.csv", 100, seed=0)
    write_reviews(folder / "dev.csv", 33, seed=1)
    return folder


@pytest.fixture
def arguments(tiny_model: Path, reviews: Path, tmp_path: Path) -> list[str]:
    """Command line of a short run: 2 epochs of 6 updates of 16 examples."""
    chosen = {
        "run.dir": tmp_path / "run",
        "run.log_every": 1,
        "model.name": tiny_model,
        "data.task": "files",
        "data.train_file": reviews / "train.csv",
        "data.validation_file": reviews / "dev.csv",
        "train.epochs": 2,
        "train.batch_size": 16,
        "freezing.initial_epochs": 0.5,
        "freezing.final_epochs": 0.5,
    }
    return command_line(chosen)


@pytest.fixture(scope="session")
def profiled(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks with ZeRO-2 and --profile."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    chosen = {
        "run.dir": folder,
        "run.log_every": 2,
        "model.name": tiny_model,
        "data.task": "files",
        "data.train_file": reviews / "train.csv",
        "data.validation_file": reviews / "dev.csv",
        "train.epochs": 4,
        "train.batch_size": 16,
        "freezing.initial_epochs": 1,
        "freezing.final_epochs": 1,
        "profile.steps": 3,
    }
    done = launch("zero2", 2, *MAIN_JOB, *command_line(chosen), "--profile")
    assert done.returncode == 0, done.stderr
    assert "1_before, 2_middle, 3_after" in " ".join(done.stdout.replace("│", " ").split())
    return folder


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """engine -> directory of an uninterrupted run with checkpoints after every 5 updates."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(engine: str) -> Path:
        if not (folder / engine).exists():
            start_all(engine, [options(folder / engine, tiny_model, reviews)])
        return folder / engine

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With AFLORA_EXCUSED_SKIPS, a test fails that is skipped for a reason without one of these words (by commas)."""
    report = yield
    excused = os.environ.get("AFLORA_EXCUSED_SKIPS")
    if report.skipped and excused and not any(word in str(report.longrepr) for word in excused.split(",")):
        report.outcome = "failed"
        report.longrepr = f"skipped although skipping is not allowed here: {report.longrepr}"
    return report
