"""What a rebuild keeps and what it lets go of, seen from outside the engine (tests/workers/rebuild.py)."""

from __future__ import annotations

import pytest

from tests.launch import ENGINES, ROOT, launch


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_survivors_keep_their_state_and_nothing_of_the_frozen_remains(engine: str) -> None:
    done = launch(engine, 2, str(ROOT / "tests" / "workers" / "rebuild.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [f"rank {rank} of {engine} ok" in done.stdout for rank in (0, 1)] == [True, True]
