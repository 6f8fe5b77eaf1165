"""A training that breaks down: nothing that is not finite is saved, and it goes on from before, at a lower rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from aflora_dist.errors import DivergedError
from aflora_dist.store import checkpoint
from aflora_dist.tasks.base import Evaluation
from aflora_dist.tasks.classification import Classification
from aflora_dist.training.run import main
from tests.launch import ROOT, launch
from tests.loop import Loop
from tests.runs import lines, options, start
from tests.workers import diverging

NAN = float("nan")
LATE = {"freezing.initial_epochs": 2}  # no decision looks at the scores before
# Checkpoints after 4, 8, 12, ... updates, a line of the log after 10 and 20; the loss breaks at the sixth update.
SPARSE = {"run.save_every": 4, "run.log_every": 10, "run.keep": 2, "train.learning_rate": 4e-3} | LATE
LOWER = {"train.learning_rate": 1e-3, "run.log_every": 1}


def saved(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize(
    "engine", ["single", *(pytest.param(e, marks=pytest.mark.distributed) for e in ("ddp", "zero3"))]
)
def test_a_run_that_diverges_between_two_checkpoints_goes_on_from_the_finite_one_at_a_lower_rate(
    engine: str, tiny_model: Path, reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = ["5", *options(folder, tiny_model, reviews, **SPARSE)]
    if engine == "single":
        assert diverging.main(arguments) == 2
        said = capfd.readouterr().err
    else:
        done = launch(engine, 2, str(ROOT / "tests" / "workers" / "diverging.py"), *arguments)
        assert done.returncode == 2, done.stderr
        said = done.stderr
    assert said.count("aflora: diverged: The loss of step 5 is nan. Lower train.learning_rate") == 1
    assert f"--resume goes on from {folder / 'checkpoints' / 'step_00000004'}" in said
    assert "training ended after" not in said
    assert "Traceback" not in said
    assert saved(folder) == ["step_00000004"]
    done = start(engine, [*options(folder, tiny_model, reviews, **SPARSE | LOWER), "--resume"])
    assert done.returncode == 0, done.stderr
    assert "From here on train.learning_rate=0.001; it was 0.004." in done.stdout
    warm, total = round(0.06 * 24), 24  # transformers' linear schedule
    factors = [min(step / warm, (total - step) / (total - warm)) for step in range(total)]
    rates = {line["step"]: line["lr"] for line in lines(folder, "metrics.jsonl")}
    assert rates == pytest.approx({step: 1e-3 * factors[step] for step in range(4, total)})
    assert json.loads((folder / "result.json").read_text())["steps"] == total


def test_a_run_that_breaks_again_at_once_is_sent_to_the_checkpoint_before(
    tiny_model: Path, reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The newest one is finite, and may be of a rate that had spoilt it already."""
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews, **SPARSE | {"run.save_every": 2})
    assert diverging.main(["5", *arguments]) == 2
    newest, before = (folder / "checkpoints" / name for name in saved(folder))
    assert f"--resume goes on from {newest}." in capfd.readouterr().err
    assert diverging.main(["0", *arguments, "--resume"]) == 2
    said = capfd.readouterr().err
    assert f"It went on from {newest}, which is finite, and may be spoilt all the same" in said
    assert f"with --resume {before}, or begin again" in said
    assert start("single", [*arguments, "--train.learning_rate", "1e-3", "--resume", str(before)]).returncode == 0


def test_an_ended_run_at_another_rate_is_another_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert main([*arguments, "--train.learning_rate", "1e-3", "--resume"]) == 2
    assert "train.learning_rate is" in capsys.readouterr().err


@pytest.mark.parametrize("best", [[], ["--run.keep_best", "accuracy"]])
def test_an_adapter_that_is_not_finite_is_not_written(
    best: list[str],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last update broke it: no loss tells of that."""
    original = Classification.evaluate

    def evaluate(self: Classification, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        next(p for p in model.parameters() if p.requires_grad).data.fill_(NAN)
        return original(self, model, accelerator)

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    once = ["--train.epochs", "1", "--run.save_every", "0", "--freezing.initial_epochs", "0"]
    assert main([*arguments, *best, *once]) == 2
    said = capsys.readouterr().err
    assert "is not finite after step 5, so it is not saved" in said
    assert "training ended after" not in said
    assert not any((tmp_path / "run" / name).exists() for name in ("adapter", "result.json"))


def poison(loop: Loop, what: str) -> None:
    parameter = loop.freezing.engine.parameters[loop.freezing.remaining[0]]
    if what == "a value":
        parameter.data.view(-1)[3] = NAN
    else:
        loop.optimizer.optimizer.state[parameter]["exp_avg_sq"].view(-1)[3] = float("inf")


@pytest.mark.parametrize("what", ["a value", "a moment"])
def test_accelerates_checkpoint_of_before_outlives_one_that_would_not_be_finite(what: str, tmp_path: Path) -> None:
    loop = Loop()
    loop.train(0, 3)
    loop.accelerator.save_state(str(tmp_path / "saved"))
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    poison(loop, what)
    with pytest.raises(DivergedError, match=f"{loop.freezing.remaining[0]} is not finite after step 2"):
        loop.accelerator.save_state(str(tmp_path / "saved"))
    assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    good: dict[str, Any] = {"value/w": torch.ones(4), "rng": torch.arange(3)}
    checkpoint.save(tmp_path, 1, good, {"step": 1}, keep=1)
    with pytest.raises(DivergedError, match="value/w is not finite"):
        checkpoint.save(tmp_path, 2, {**good, "value/w": torch.tensor([1.0, NAN])}, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
