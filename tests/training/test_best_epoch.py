"""run.keep_best and run.patience: adapter/ is the best epoch's, on every engine, after every restart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.runs import assert_same_to_the_bit, options, start, start_all
from tests.small_lm import make_small_language_model, write_problems

# A learning rate at which epochs get worse, too.
KEPT = {
    "train.learning_rate": 0.1,
    "train.head_learning_rate": 0.1,
    "train.max_grad_norm": 0,
    "train.epochs": 6,
    "freezing.final_epochs": 3,
    "run.keep_best": "accuracy",
}


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def accuracy(run: Path, model: Path, data: Path) -> float:
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    rows = [line.split(",") for line in (data / "dev.csv").read_text().splitlines()[1:]]
    batch = AutoTokenizer.from_pretrained(model)([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = adapted(**batch).logits.argmax(-1).tolist()
    return sum(p == (label == "positive") for p, (_, label) in zip(predicted, rows, strict=True)) / len(rows)


@pytest.mark.parametrize(
    "engine",
    [
        "single",
        pytest.param("ddp", marks=pytest.mark.distributed),
        pytest.param("zero1", marks=pytest.mark.distributed),
        pytest.param("zero3", marks=pytest.mark.distributed),
        pytest.param("fsdp2", marks=pytest.mark.distributed),
    ],
)
def test_the_adapter_is_the_best_epoch_s_after_a_restart_too(
    engine: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    start_all(engine, [options(whole, tiny_model, reviews, **KEPT)])
    result = result_of(whole)
    values = [evaluation["accuracy"] for evaluation in result["evaluations"]]
    best = values.index(max(values))
    assert len(values) == 6
    assert values[-1] < values[best], "not a case: the last epoch is the best"
    assert result["best"] == {"metric": "accuracy", "epoch": best + 1, "metrics": result["evaluations"][best]}
    assert result["last"] == {"epoch": 6, "metrics": result["evaluations"][-1]}
    assert result["metrics"] == result["best"]["metrics"]
    assert accuracy(whole, tiny_model, reviews) == pytest.approx(values[best])

    # As if killed after an update of the last epoch: the best one's adapter is in the checkpoint alone.
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("adapter", "result.json", "step_00000036"))
    start_all(engine, [options(resumed, tiny_model, reviews, **{**KEPT, "run.resume": "last"})])
    assert_same_to_the_bit(resumed, whole)
    assert result_of(resumed)["best"] == result["best"]
    assert accuracy(resumed, tiny_model, reviews) == pytest.approx(values[best])


def test_patience_ends_a_run_that_no_longer_improves(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = start("single", options(run, tiny_model, reviews, **{**KEPT, "train.epochs": 30, "run.patience": 2}))
    assert done.returncode == 0, done.stderr
    result = result_of(run)
    assert result["last"]["epoch"] == len(result["evaluations"]) == result["best"]["epoch"] + 2 < 30
    assert accuracy(run, tiny_model, reviews) == pytest.approx(result["best"]["metrics"]["accuracy"])
    said = done.stdout + done.stderr
    assert "has not improved since epoch" in said
    assert "for all 180 updates (T)" in said
    assert "projection matrices had not frozen yet" in said
    again = start("single", options(run, tiny_model, reviews, **{**KEPT, "train.epochs": 30, "run.resume": "last"}))
    assert again.returncode == 0
    assert f"epoch {result['last']['epoch']} of 30 with run.patience=2. It goes on with a higher one" in again.stdout
    assert result_of(run) == result, "it has ended, and stays so"


def test_a_run_that_ended_for_want_of_patience_goes_on_with_more(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    more = {**KEPT, "train.epochs": 12}
    start_all("single", [options(longer, tiny_model, reviews, **more, **{"run.patience": 1})])
    ended = result_of(longer)["last"]["epoch"]
    start_all("single", [options(whole, tiny_model, reviews, **more, **{"run.patience": 4})])
    assert ended < result_of(whole)["last"]["epoch"], "not a case"
    (said,) = start_all(
        "single", [options(longer, tiny_model, reviews, **more, **{"run.patience": 4, "run.resume": "last"})]
    )
    assert f"ended after epoch {ended} of 12 with run.patience=1 and goes on with run.patience=4" in said
    assert result_of(longer)["best"] == result_of(whole)["best"]
    assert result_of(longer)["evaluations"] == result_of(whole)["evaluations"]
    assert_same_to_the_bit(longer, whole)


def test_keeping_the_best_is_not_begun_in_the_middle(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    run, without = tmp_path / "run", {key: value for key, value in KEPT.items() if key != "run.keep_best"}
    short = {"train.epochs": 2, "freezing.final_epochs": 1}
    start_all("single", [options(run, tiny_model, reviews, **{**without, **short})])
    (run / "result.json").unlink()
    for first, then, how in ((without, KEPT, "without"), (KEPT, without, "with")):
        if how == "with":
            start_all("single", [options(run, tiny_model, reviews, **{**first, **short, "run.overwrite": True})])
            (run / "result.json").unlink()
        done = start("single", options(run, tiny_model, reviews, **{**then, **short, "run.resume": "last"}))
        assert done.returncode == 2
        assert f"was written {how} run.keep_best" in done.stderr
        assert "another method" not in done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"run.keep_best": "bleu"}, "run.keep_best=bleu is not measured here. Measured are: accuracy, f1."),
        ({"run.patience": 2}, "name it with run.keep_best"),
        ({"run.keep_best": "accuracy", "run.patience": 0}, "run.patience must be at least 1"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(
    more: dict[str, Any], said: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    done = start("single", options(tmp_path / "run", tiny_model, reviews, **more))
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_language_model_keeps_its_lowest_loss(tmp_path: Path) -> None:
    model = make_small_language_model(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", 48, seed=0)
    write_problems(tmp_path / "dev.jsonl", 12, seed=1)
    more = {"data.task": "sft", "train.learning_rate": 0.3, "train.max_grad_norm": 0, "data.max_new_tokens": 4}
    more |= {"data.train_file": tmp_path / "train.jsonl", "data.validation_file": tmp_path / "dev.jsonl"}
    refused = start("single", options(tmp_path / "run", model, tmp_path, **more, **{"run.keep_best": "f1"}))
    assert "Measured are: exact_match, loss, perplexity." in refused.stderr
    done = start("single", options(tmp_path / "run", model, tmp_path, **more, **{"run.keep_best": "loss"}))
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    losses = [evaluation["loss"] for evaluation in result["evaluations"]]
    assert result["metrics"]["loss"] == min(losses) < max(losses)


def test_a_checkpoint_without_a_best_epoch_is_not_taken_up_with_one(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start("single", options(run, tiny_model, reviews)).returncode == 0
    (run / "result.json").unlink()
    more = {"run.resume": "last", "run.keep_best": "accuracy"}
    done = start("single", options(run, tiny_model, reviews, **more))
    assert done.returncode == 2
    assert "run.keep_best" in done.stderr


def test_less_is_better_for_a_loss_and_nan_is_never_best() -> None:
    from aflora_dist.store.best import BestEpoch

    best = BestEpoch("loss", 2, lambda: {"a": torch.zeros(1)})
    for epoch, value in enumerate([float("nan"), 3.0, 2.0, 2.0, float("nan")], start=1):
        best.evaluated(epoch, {"loss": value})
    assert (best.epoch, best.value, best.exhausted) == (3, 2.0, True)
