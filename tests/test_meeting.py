"""Ranks wait where nothing times out, learn for whom, and are told when nobody will come."""

from __future__ import annotations

import json
import re

import pytest

from tests.launch import ROOT, launch, launch_arguments

pytestmark = pytest.mark.distributed
WORKERS = ROOT / "tests" / "workers"


def lines(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith("rank"))


def test_work_that_takes_longer_than_collectives_may_is_waited_for_and_its_error_is_everybody_s() -> None:
    done = launch("ddp", 2, str(WORKERS / "waiting.py"))
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in lines(done.stdout))
    for what in ("on main", "first", "second"):
        assert {said[f"rank {rank}, {what}"] for rank in (0, 1)} == {"done"}
    assert said["rank 0, on main, failing"] == "OSError: no space"
    assert said["rank 1, on main, failing"] == "AFLoRAError: The main process failed: OSError: no space"
    assert "Rank 1 on " in said["rank 0, silent"]
    assert " has not been heard of " in said["rank 0, silent"]
    assert said["rank 1, in a collective"].startswith("RuntimeError")  # the limit is in force
    waits = re.findall(r"aflora: rank (\d) has waited \d s for rank (\d)", done.stderr)
    assert waits == [("1", "0")] * 2 + [("0", "1")] * 2


def test_a_rank_that_fails_before_the_first_collective_leaves_nobody_waiting(arguments: list[str]) -> None:
    done = launch("ddp", 2, "-m", "tests.workers.parting", *arguments)
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == [
        "rank 0, a device: 2",
        "rank 0, a lock: 2",
        "rank 0, data: 2",
        "rank 0, files of a model: 2",
        "rank 0, weights: 2",
        "rank 1, a device: 2",
        "rank 1, a lock: 2",
        "rank 1, data: 2",
        "rank 1, files of a model: 2",
        "rank 1, weights: KeyError",
    ]
    errors = [line for line in done.stderr.splitlines() if line.startswith("aflora: error:")]
    assert [error.removeprefix("aflora: error: ").split(" (")[0] for error in errors] == [
        "a lock of this node's",
        "too few GPUs",
        f"The model '{model_of(arguments)}' could not be loaded: no route to the hub",
        "Rank 1 failed: KeyError: 'a weight'",
        "no such file here",
    ]


def test_ranks_that_are_started_anew_hear_nothing_of_what_those_before_them_said() -> None:
    anew = [*launch_arguments("ddp", 2), "--max_restarts", "1"]
    done = launch("ddp", 2, str(WORKERS / "restarting.py"), launcher=anew, true_launch=True)
    assert done.returncode == 0, done.stderr[-3000:]
    heard = {f"rank {rank}, {number}: 1.{number} 1.{number}" for rank in (0, 1) for number in (0, 1, 2)}
    assert heard <= {*lines(done.stdout)}


def model_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--model.name") + 1]


def test_snapshots_and_stop_requests_go_over_gloo_beside_nccl_and_over_nccl_where_gloo_cannot_be_had() -> None:
    done = launch("ddp", 2, str(WORKERS / "beside_nccl.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert len(seen) == 6
    for found in seen:
        assert found["beside"] is (found["case"] == "gloo")
        assert found["made"] == (found["case"] != "host names")  # it would try for half an hour
        assert found["through it"]  # all of them are batched
        assert all(found["through it"]) is found["beside"]
        assert found["same"]
        assert found["stops"]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("aflora: warning: the ranks cannot talk")]
    assert len(warnings) == 2
    assert all("GLOO_SOCKET_IFNAME" in warning for warning in warnings)
    assert "Gloo connectFullMesh failed with 127.0.1.1)" in warnings[0]
    assert "the host name node0 resolves to 127.0.1.1" in warnings[1]
