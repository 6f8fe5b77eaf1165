"""What looks at runs works where torch does not, and nothing imports what takes seconds before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.view.written import write_run
from tests.watch.cuda_trace import cuda_trace

HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "tensorboard", "safetensors")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "seed0")


@pytest.fixture(params=["ImportError('not here')", "OSError('libcudart.so.12: cannot open shared object file')"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder for PYTHONPATH in which every heavy package fails when it is imported."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise {request.param}\n")
    return folder


def aflora(*arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aflora_dist.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path), "COLUMNS": "120", "MPLBACKEND": "agg"},
        check=False,
        timeout=120,
    )


def without_matplotlib(folder: Path) -> Path:
    (folder / "matplotlib.py").write_text("raise ImportError('not here')\n")
    return folder


def test_show_needs_neither_torch_nor_matplotlib(run: Path, broken: Path) -> None:
    done = aflora("show", run, path=without_matplotlib(broken))
    assert done.returncode == 0, done.stderr
    assert "tiny on rte: finished" in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if "intermediate.dense A" in line)
    assert [int(word) for word in row.split() if word.isdigit()] == [3, 7]
    assert "8 of 8 projection matrices frozen in 8 events." in done.stdout
    assert "2 x zero2" in done.stdout


def test_show_draws_without_torch(run: Path, broken: Path, tmp_path: Path) -> None:
    done = aflora("show", run, "--figures", tmp_path / "figures", path=broken)
    assert done.returncode == 0, done.stderr
    drawn = [path.name for path in sorted((tmp_path / "figures").iterdir())]
    assert drawn == ["curves.png", "freeze_map.png", "scores.png"]


def test_figures_that_cannot_be_written_are_an_error_in_a_line(run: Path, broken: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = aflora("show", run, "--figures", tmp_path / "file", path=broken)
    assert done.returncode == 2
    assert done.stderr == f"aflora: error: The figures could not be written to {tmp_path / 'file'}: File exists.\n"


def test_trace_needs_neither_torch_nor_matplotlib(run: Path, broken: Path) -> None:
    file = run / "tensorboard" / "profile" / "training" / "host_0.1.pt.trace.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(cuda_trace()))
    done = aflora("trace", run, path=without_matplotlib(broken))
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("computing "))
    assert row.split() == ["computing", "0.338", "34%"]


def test_collect_needs_neither_torch_nor_matplotlib(run: Path, broken: Path, tmp_path: Path) -> None:
    done = aflora("collect", run.parent, "--json", tmp_path / "table.json", path=without_matplotlib(broken))
    assert done.returncode == 0, done.stderr
    assert "0.7500" in done.stdout
    (line,) = json.loads((tmp_path / "table.json").read_text())
    assert (line["task"], line["metric"], line["mean"], line["seeds"]) == ("rte", "accuracy", 0.75, 1)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "usage: aflora train"),
        ([], 2, "usage: aflora train"),
        (["shwo"], 2, "aflora: error: There is no command 'shwo'."),
        (["show", "--help"], 0, "usage: aflora show"),
        (["collect", "--help"], 0, "usage: aflora collect"),
        (["trace", "--help"], 0, "usage: aflora trace"),
        (["train", "--help"], 0, "--train.learning_rate"),
        (["train", "--train.nonsense", "3"], 2, "--train.nonsense"),
        (["train", "--preset", "glue/nonsense"], 2, "There is no preset 'glue/nonsense'"),
        (["train", "--train.epochs", "0"], 2, "train.epochs must be at least 1"),
    ],
)
def test_help_and_wrong_options_are_found_without_heavy_packages(
    arguments: list[str], status: int, said: str, broken: Path
) -> None:
    done = aflora(*arguments, path=without_matplotlib(broken))
    assert done.returncode == status, done.stderr
    assert said in (done.stderr if status else done.stdout)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "aflora_dist",
        "aflora_dist.cli",
        "aflora_dist.errors",
        "aflora_dist.freezing",
        "aflora_dist.names",
        "aflora_dist.store.records",
        "aflora_dist.training.command_line",
        "aflora_dist.training.run",
        "aflora_dist.view.collect",
        "aflora_dist.view.report",
        "aflora_dist.view.show",
        "aflora_dist.view.trace",
    ],
)
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'numpy', 'matplotlib', *{HEAVY}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")
