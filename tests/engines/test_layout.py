"""Who holds which score fragments on thousands of ranks, by torch's fake process group."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from profiling.overhead import layout
from tests.launch import ROOT


@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "world"), [(3, 64), (1000, 4096)])
def test_every_rank_holds_its_share_and_no_more(rank: int, world: int) -> None:
    command = [sys.executable, "-m", "tests.workers.fake", str(rank), str(world)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    elements = sum(found["numels"].values())
    held = {
        offset + start + i
        for name, start, numel in found["fragments"]
        for offset in [sum(n for _, n in list(found["numels"].items())[: list(found["numels"]).index(name)])]
        for i in range(numel)
    }
    share = -(-elements // world)
    assert held == set(range(rank * share, min((rank + 1) * share, elements)))
    # float32 averages of gradient and uncertainty, as the table on paper says
    assert layout(world, elements=elements)["score_bytes_held"] == 2 * 4 * len(held)
