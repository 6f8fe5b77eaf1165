"""What a freeze moves, holds, keeps and lets go of, seen from outside the engine."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from aflora_dist.compat.contract import is_older
from tests.launch import ENGINES, ROOT, launch

pytestmark = pytest.mark.distributed
EVERY = (*ENGINES, "fsdp2")
WORKERS = ROOT / "tests" / "workers"


def command(engine: str, module: str, *arguments: str) -> list[str]:
    """What to launch for `MODULE.main(ARGUMENTS)` on an engine."""
    if engine == "fsdp2":
        return ["-m", "profiling.fsdp_on_cpu", f"tests.workers.{module}", *arguments]
    return ["-m", f"tests.workers.{module}", *arguments]


def printed(engine: str, ranks: int, mark: str, module: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON that each rank printed behind a mark."""
    done = launch(engine, ranks, *command(engine, module, *arguments))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line.removeprefix(mark)) for line in done.stdout.splitlines() if line.startswith(mark)]
    assert [row["kind"] for row in found] == [engine] * ranks
    return found


@functools.cache
def heavy(engine: str, *arguments: str) -> list[dict[str, Any]]:
    return printed(engine, 2, "HEAVY ", "heavy", *arguments)


@pytest.mark.parametrize("engine", EVERY)
def test_survivors_keep_their_state_and_nothing_of_the_frozen_remains(engine: str) -> None:
    done = launch(engine, 2, *command(engine, "rebuild"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [f"rank {rank} of {engine} ok" in done.stdout for rank in (0, 1)] == [True, True]


@pytest.mark.parametrize("engine", EVERY)
def test_a_freeze_moves_only_what_changes_its_owner(engine: str) -> None:
    """Beside a trained head of three million elements, counted below the library."""
    for found in heavy(engine):
        agreement = 8 + 16  # bytes of optimizer state for the log; that the ranks agree
        assert found["drop of nothing"] == 0
        kinds = 3 * found["moved"] + 2 * found["moved of matrices"]  # value and two moments; two averages of the score
        assert found["freeze"] == agreement + 4 * kinds  # on two ranks what one sends the other one takes
        if engine in ("zero1", "zero2"):
            assert 0 < found["moved"] < 1000
        else:
            assert found["moved"] == 0


@pytest.mark.parametrize("engine", EVERY)
def test_a_freeze_needs_no_more_memory_than_a_step(engine: str) -> None:
    for found in heavy(engine):
        assert found["step peak"] > 4 * found["bytes"]  # the measure sees the head, its gradient and its state
        assert found["freeze peak"] <= 1.1 * found["step peak"]


@pytest.mark.parametrize("engine", EVERY)
def test_half_of_a_model_freezes_in_the_memory_of_a_step(engine: str) -> None:
    """In units of blocks, in full fine-tuning: what changes its rank under ZeRO-1 and 2 goes in bounded pieces."""
    for found in heavy(engine, "blocks"):
        assert found["step peak"] > 1.5 * found["bytes"]
        assert found["freeze peak"] <= 1.1 * found["step peak"]
        assert (found["moved"] > found["bytes"] / 4 / 8) == (engine in ("zero1", "zero2"))


@pytest.mark.parametrize(
    ("engine", "groups"), [*((engine, "head") for engine in EVERY), ("zero2", "ab"), ("zero3", "ab")]
)
def test_accelerate_s_own_checkpoint_holds_the_freezing(engine: str, groups: str, tmp_path: Any) -> None:
    """Saved before the first freeze, between two and after the last; loaded by the next training of the process.

    With groups that run empty ("ab") ZeRO works on a stand-in of the optimizer.
    """
    if engine == "fsdp2" and is_older("accelerate", "1.13"):
        pytest.skip("accelerate before 1.13 does not read the optimizer's state (refused: tests/test_compat.py)")
    for found in printed(engine, 2, "SAVED ", "saved", str(tmp_path), "--groups", groups):
        assert found["events"] > 1
        assert found["equal"] == [{"step": True, "losses": True, "log": True, "weights": True}] * 3
        # DeepSpeed itself keeps a ZeRO-3 model alive, with or without this library
        assert found["freed"] == [True, True, engine != "zero3"]
