"""Which score fragments each of many ranks holds: every element once, and no rank much more than its share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from accelerate import Accelerator

from aflora_dist.engines import create_engine
from aflora_dist.engines.ddp import ReplicatedEngine
from aflora_dist.engines.transfer import Fragment, plan
from tests.workers.tiny import build_model, build_optimizer


class OneOfMany(ReplicatedEngine):
    """One rank of a DDP training, as far as it decides what it observes."""

    rank, world_size = 0, 1  # type: ignore[assignment]


def fragments(names: list[str], world_size: int, engine: Any) -> list[list[Fragment]]:
    found = []
    engine.__class__ = type("Rank", (OneOfMany,), {})
    for rank in range(world_size):
        engine.__class__.rank, engine.__class__.world_size = rank, world_size
        found.append(engine.buckets(names)[0])
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 64, 4096])
def test_every_element_is_observed_by_one_rank_and_stays_there_when_others_freeze(world_size: int) -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
    engine = create_engine(accelerator, model, optimizer)
    names = [name for name in engine.trainable if name.endswith((".A", ".B"))]
    held = fragments(names, world_size, engine)
    for name in names:
        covered = sorted((f.start, f.start + f.numel) for rank in held for f in rank if f.name == name)
        assert covered[0][0] == 0
        assert covered[-1][1] == engine.numel(name)
        assert all(before[1] == after[0] for before, after in pairwise(covered))
    loads = [sum(f.numel for f in rank) for rank in held]
    assert max(loads) <= sum(loads) / world_size + len(names)
    fewer = fragments(names[::2], world_size, engine)
    before, after = dict(enumerate(held)), dict(enumerate(fewer))
    assert all(move.source == move.target for move in plan(before, after))
