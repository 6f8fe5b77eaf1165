"""Every engine freezes and learns what one process does on the same global batches."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import ENGINES, launch_series
from tests.selection import is_chosen

pytestmark = pytest.mark.distributed
# What tests/workers/tiny.py is told.
CASES: dict[str, list[str]] = {
    "plain": [],
    "clip": ["--clip", "0.05"],
    "clip, accumulation 3": ["--clip", "0.05", "--accumulation", "3"],
    "a group of matrices": ["--groups", "split", "--freezing", json.dumps({"score": "sensitivity", "pairwise": True})],
    "groups of A and of B": ["--groups", "ab"],
    "by quantile": ["--freezing", json.dumps({"rule": "quantile", "every": 2})],
    "checkpointing, all layers": ["--checkpointing", "--adapter", json.dumps({"freezable": "all"})],
    "bf16": ["--precision", "bf16"],
}


OF_FSDP2 = {
    "offload": ["--offload", "--clip", "0.05"],
    "replicated adapter": ["--replicated", "--clip", "0.05"],
    "replicated adapter, accumulation 3": ["--replicated", "--accumulation", "3", "--clip", "0.05"],
}
# On three ranks: each engine with clipping and with one of the other cases.
THREE = [(engine, "clip") for engine in (*ENGINES, "fsdp2")]
THREE += [("ddp", "by quantile"), ("zero1", "groups of A and of B"), ("zero2", "a group of matrices")]
THREE += [("zero3", "by quantile"), ("fsdp2", "a group of matrices")]
FOUR = {"ddp": ("plain",), "zero2": ("plain",), "fsdp2": ("plain", "two replicas")}  # and on four
EVERY = (*ENGINES, "fsdp2")


def cases(engine: str, processes: int) -> dict[str, list[str]]:
    """Name of a case and what tests/workers/tiny.py is told: of those that a test looks at which is run."""
    known = CASES | OF_FSDP2 | {"two replicas": ["--replicas", "2", "--clip", "0.05"]}
    if processes == 1:
        return {case: told for case, told in CASES.items() if case != "bf16"}
    if processes == 2:
        pairs = {case: (test_two_ranks_equal_one_process, f"[{engine}-{case}]") for case in CASES}
        pairs["bf16"] = (test_bfloat16_trains_and_freezes_the_same_on_both_ranks, f"[{engine}]")
        return {case: known[case] for case in pairs if chosen(*pairs[case])} | (OF_FSDP2 if engine == "fsdp2" else {})
    if processes == 3:
        asked = [case for place, case in THREE if place == engine]
        return {case: known[case] for case in asked if chosen(test_three_ranks_equal_one_process, f"[{engine}-{case}]")}
    return {case: known[case] for case in FOUR[engine]}


def chosen(test: Any, parameters: str) -> bool:
    return is_chosen(f"tests/engines/test_equivalence.py::{test.__name__}{parameters}")


@functools.cache
def run(engine: str, processes: int) -> dict[str, list[dict[str, Any]]]:
    """What each rank saw in each case."""
    told = cases(engine, processes)
    worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
    with tempfile.TemporaryDirectory() as out:
        folders = {case: Path(out) / str(number) for number, case in enumerate(told)}
        runs = [[*worker, "tests.workers.tiny", str(folders[case]), *arguments] for case, arguments in told.items()]
        launch_series(engine, processes, runs)
        return {
            case: [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
            for case, folder in folders.items()
        }


def one_process(case: str) -> dict[str, Any]:
    return run("single", 1)[case][0]


def decisions(result: dict[str, Any]) -> list[tuple[int, list[str]]]:
    return [(event["step"], event["frozen"]) for event in result["events"]]


def check_against_one_process(
    results: list[dict[str, Any]], reference: dict[str, Any], counted_once: bool = True
) -> None:
    """`counted_once`: each element's optimizer state is on as many ranks as any other's."""
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
            falls = event["optimizer_state_bytes"] * result["initial_params"]
            assert (falls == event["trainable_params"] * result["initial_bytes"]) == counted_once


@pytest.mark.parametrize("case", [case for case in CASES if case != "bf16"])
@pytest.mark.parametrize("engine", EVERY)
def test_two_ranks_equal_one_process(engine: str, case: str) -> None:
    results = run(engine, 2)[case]
    assert {(r["kind"], r["world_size"]) for r in results} == {(engine, 2)}
    check_against_one_process(results, one_process(case))


@pytest.mark.parametrize(("engine", "case"), THREE)
def test_three_ranks_equal_one_process(engine: str, case: str) -> None:
    results = run(engine, 3)[case]
    assert {(r["kind"], r["world_size"]) for r in results} == {(engine, 3)}
    check_against_one_process(results, one_process(case))


@pytest.mark.parametrize("engine", FOUR)
def test_four_ranks_equal_one_process(engine: str) -> None:
    check_against_one_process(run(engine, 4)["plain"], one_process("plain"))


def test_offload_to_the_cpu_equals_one_process() -> None:
    check_against_one_process(run("fsdp2", 2)["offload"], one_process("clip"))


@pytest.mark.parametrize("more", ["", ", accumulation 3"])
def test_an_adapter_that_is_left_out_of_the_sharding_equals_one_process(more: str) -> None:
    """The head is sharded: both are clipped by one norm."""
    results = run("fsdp2", 2)[f"replicated adapter{more}"]
    check_against_one_process(results, one_process("clip"), counted_once=False)


def test_replicas_of_shards_equal_one_process() -> None:
    """HSDP, two by two: of the ranks that hold the same shard one observes, and every element counts once."""
    check_against_one_process(run("fsdp2", 4)["two replicas"], one_process("clip"))


def test_clipping_was_active_and_scores_do_not_see_it() -> None:
    clipped, free = one_process("clip"), one_process("plain")
    assert clipped["losses"][1:] != pytest.approx(free["losses"][1:], abs=1e-5)
    first, other = clipped["events"][0], free["events"][0]
    # Adam's steps hardly depend on the gradient's scale: had scores seen the clipped gradient, they
    # would differ by its square.
    assert first["scores"] == pytest.approx(other["scores"], rel=0.3)


def test_accumulation_does_not_change_what_one_process_does() -> None:
    check_against_one_process([one_process("clip, accumulation 3")], one_process("clip"))


def test_a_group_ran_empty_while_others_trained() -> None:
    """Of the case with groups of A and of B: all B are frozen before the last A."""
    events = one_process("groups of A and of B")["events"]
    empty = [e["step"] for e in events if not any(n.endswith(".B") for n in set(e["scores"]) - set(e["frozen"]))]
    assert empty[0] < events[-1]["step"]


@pytest.mark.parametrize("engine", EVERY)
def test_bfloat16_trains_and_freezes_the_same_on_both_ranks(engine: str) -> None:
    first, second = run(engine, 2)["bf16"]
    assert first["events"][-1]["remaining"] == 0
    for mine, theirs in zip(first["events"], second["events"], strict=True):
        assert {**mine, "rebuild_seconds": 0} == {**theirs, "rebuild_seconds": 0}
    for name, value in first["final"].items():
        assert torch.equal(value, second["final"][name]), name
