"""What earlier releases wrote is gone on from: tests/data/format_2 holds step 10 of a run, and step 5 of a loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aflora_dist.store import checkpoint
from aflora_dist.training.run import main
from tests.loop import Loop
from tests.runs import freezes, lines, options, weights

WRITTEN = Path(__file__).parents[1] / "data" / "format_2"


def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_release(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "step_00000010"
    saved.mkdir()
    shutil.copy(WRITTEN / "state.safetensors", saved)
    training = json.loads((WRITTEN / "training.json").read_text())
    assert training["format"] == 2
    training["config"]["model"]["name"] = str(tiny_model)
    (saved / "training.json").write_text(json.dumps(training))
    found = {name: checkpoint._fingerprint(saved / name) for name in ("state.safetensors", "training.json")}
    (saved / "manifest.json").write_text(json.dumps(found))
    keeping = options(tmp_path / "run", tiny_model, reviews, **{"run.keep_best": "accuracy"})
    assert main([*keeping, "--resume", str(saved)]) == 0
    whole = undisturbed("single")
    assert freezes(tmp_path / "run") == freezes(whole)
    losses = [[line["loss"] for line in lines(folder, "metrics.jsonl")] for folder in (tmp_path / "run", whole)]
    assert losses[0] == pytest.approx(losses[1][10:], abs=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", whole)]
    assert results[0]["evaluations"] == results[1]["evaluations"]
    assert results[0]["avg_trainable_params"] == results[1]["avg_trainable_params"]
    assert weights(tmp_path / "run").keys() == weights(whole).keys()


def test_accelerates_checkpoint_of_an_earlier_release_holds_the_freezing(tmp_path: Path) -> None:
    whole, cut, resumed = Loop(), Loop(), Loop()
    whole.train()
    cut.train(0, 5)
    cut.accelerator.save_state(str(tmp_path / "state"))
    shutil.copy(WRITTEN / "aflora_freezing.pt", tmp_path / "state" / "aflora_freezing.pt")
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.freezing.step == 5
    resumed.train(5, 12)
    mine, theirs = resumed.freezing.events, whole.freezing.events
    assert [(event.step, event.frozen) for event in mine] == [(event.step, event.frozen) for event in theirs]
    for event, expected in zip(mine, theirs, strict=True):
        assert event.scores == pytest.approx(expected.scores, rel=1e-4)
    final = whole.weights()
    for name, value in resumed.weights().items():
        torch.testing.assert_close(value, final[name], rtol=0, atol=1e-5)
