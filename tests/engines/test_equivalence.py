"""Every engine freezes and learns what one process does on the same global batches."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import ENGINES, ROOT, launch

pytestmark = pytest.mark.distributed
WORKER = str(ROOT / "tests" / "workers" / "tiny.py")


@functools.cache
def run(engine: str, processes: int, *arguments: str, mixed_precision: str = "no") -> list[dict[str, Any]]:
    """What each rank saw."""
    with tempfile.TemporaryDirectory() as out:
        done = launch(engine, processes, WORKER, out, *arguments, mixed_precision=mixed_precision)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(Path(out) / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


def decisions(result: dict[str, Any]) -> list[tuple[int, list[str]]]:
    return [(event["step"], event["frozen"]) for event in result["events"]]


def check_against_one_process(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    matrices = sum(len(names) for _, names in decisions(reference))
    assert matrices >= 8
    for result in results:
        assert decisions(result) == decisions(reference)
        for event, expected in zip(result["events"], reference["events"], strict=True):
            assert event["scores"] == pytest.approx(expected["scores"], rel=1e-4, abs=0)
            assert event["trainable_params"] == expected["trainable_params"]
        assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert result["rates"] == reference["rates"]
        assert result["final"].keys() == reference["final"].keys()
        for name, value in result["final"].items():
            torch.testing.assert_close(value, reference["final"][name], rtol=0, atol=1e-5, msg=name)
        # a frozen matrix has taken its step's update and changes no bit afterwards
        assert len(result["at_freeze"]) == matrices
        for name, value in result["at_freeze"].items():
            assert torch.equal(value, result["final"][name]), name
        # optimizer state falls by exactly the frozen share, over all ranks
        for event in result["events"]:
            assert (
                event["optimizer_state_bytes"] * result["initial_params"]
                == event["trainable_params"] * result["initial_bytes"]
            )


@pytest.mark.parametrize("accumulation", ["1", "3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_process_with_clipping_and_accumulation(engine: str, accumulation: str) -> None:
    arguments = ("--clip", "0.05", "--accumulation", accumulation)
    (reference,) = run("single", 1, *arguments)
    results = run(engine, 2, *arguments)
    assert {(r["kind"], r["world_size"]) for r in results} == {(engine, 2)}
    check_against_one_process(results, reference)


def test_clipping_was_active_and_scores_do_not_see_it() -> None:
    (clipped,), (free,) = run("single", 1, "--clip", "0.05", "--accumulation", "1"), run("single", 1)
    assert clipped["losses"][1:] != pytest.approx(free["losses"][1:], abs=1e-5)
    first, other = clipped["events"][0], free["events"][0]
    # Adam's steps hardly depend on the gradient's scale: had scores seen the clipped gradient, they
    # would differ by its square.
    assert first["scores"] == pytest.approx(other["scores"], rel=0.3)


def test_accumulation_does_not_change_what_one_process_does() -> None:
    (once,), (thrice,) = (run("single", 1, "--clip", "0.05", "--accumulation", n) for n in "13")
    check_against_one_process([thrice], once)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_four_ranks_equal_one_process(engine: str) -> None:
    check_against_one_process(run(engine, 4), run("single", 1)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_param_group_may_run_empty(engine: str) -> None:
    arguments = ("--groups", "split", "--freezing", json.dumps({"score": "sensitivity", "pairwise": True}))
    check_against_one_process(run(engine, 2, *arguments), run("single", 1, *arguments)[0])


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_scores_go_on_after_a_group_has_run_empty(engine: str) -> None:
    (reference,) = run("single", 1, "--groups", "ab")
    empty = [
        e["step"] for e in reference["events"] if not any(n.endswith(".B") for n in set(e["scores"]) - set(e["frozen"]))
    ]
    assert empty[0] < reference["events"][-1]["step"]  # all B are frozen before the last A
    check_against_one_process(run(engine, 2, "--groups", "ab"), reference)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_gradient_checkpointing_and_all_layers_freezable(engine: str) -> None:
    arguments = ("--checkpointing", "--adapter", json.dumps({"freezable": "all"}))
    check_against_one_process(run(engine, 2, *arguments), run("single", 1, *arguments)[0])


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_bfloat16_trains_and_freezes_the_same_on_both_ranks(engine: str) -> None:
    first, second = run(engine, 2, mixed_precision="bf16")
    assert first["events"][-1]["remaining"] == 0
    for mine, theirs in zip(first["events"], second["events"], strict=True):
        assert {**mine, "rebuild_seconds": 0} == {**theirs, "rebuild_seconds": 0}
    for name, value in first["final"].items():
        assert torch.equal(value, second["final"][name]), name
