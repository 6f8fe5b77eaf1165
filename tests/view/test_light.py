"""What looks at runs works where torch does not, and nothing imports what takes seconds before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch import ROOT

HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "tensorboard", "safetensors")
NAME = "base_model.model.bert.encoder.layer.{}.{}.dense.aflora.default.{}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a finished run of 12 updates, as docs/main_job.md has it: two layers, eight matrices."""
    folder = tmp_path / "runs" / "seed0"
    folder.mkdir(parents=True)
    config = {
        "run": {"dir": str(folder)},
        "model": {"name": "tiny"},
        "data": {"task": "rte"},
        "train": {"epochs": 2, "seed": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = [
        {
            "step": step,
            "epoch": (step + 1) / 6,
            "loss": 1 / (step + 1),
            "lr": 1e-2,
            "head_lr": 4e-2,
            "grad_norm": 1.0,
            "trainable_params": 1000 - 50 * step,
            "samples_per_second": 100.0,
        }
        for step in range(12)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    matrices = [NAME.format(i, kind, m) for i in (0, 1) for kind in ("intermediate", "output") for m in "AB"]
    events = [
        {"step": 3 + i, "frozen": [name], "scores": dict.fromkeys(matrices[i:], 0.1 + i)}
        for i, name in enumerate(matrices)
    ]
    (folder / "freeze_log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    result = {
        "task": "rte",
        "metrics": {"accuracy": 0.75},
        "evaluations": [{"accuracy": 0.7}, {"accuracy": 0.75}],
        "engine": "zero2",
        "world_size": 2,
        "steps": 12,
        "train_seconds": 3.0,
        "samples_per_second": 64.0,
        "avg_trainable_params": 700.0,
        "lora_r8_trainable_params": 9000,
        "freezable_matrices": 8,
        "freeze_events": 8,
        "freeze_seconds_total": 0.01,
        "traces": [],
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


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
        "aflora_dist.training.config",
        "aflora_dist.training.run",
        "aflora_dist.view.collect",
        "aflora_dist.view.report",
        "aflora_dist.view.show",
    ],
)
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'numpy', 'matplotlib', *{HEAVY}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")
