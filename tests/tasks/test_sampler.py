"""Which examples make up an update, how they are dealt by length, and what their pieces weigh."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from aflora_dist.options import DataConfig
from aflora_dist.tasks.data import load_data
from aflora_dist.tasks.model import resolve_name
from aflora_dist.tasks.sampler import GlobalBatchSampler, cut, deal, padded, spread


def random_lengths(seed: int, count: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randint(3, 120) for _ in range(count)]


LENGTHS = random_lengths(1, 200)


def samplers(world_size: int, **more: Any) -> list[GlobalBatchSampler]:
    options: dict[str, Any] = {"world_size": world_size, "seed": 3, **more}
    return [GlobalBatchSampler(LENGTHS, 24, rank=rank, **options) for rank in range(world_size)]


def global_batches(world_size: int, epoch: int = 0, start: int = 0, **more: Any) -> list[list[int]]:
    """The examples of each update, over all ranks and micro-batches."""
    drawn = []
    for sampler in samplers(world_size, **more):
        sampler.epoch, sampler.start = epoch, start
        pieces = list(sampler)
        assert len(pieces) == len(sampler)
        k = sampler.micro_batches
        drawn.append([[*itertools.chain(*pieces[i : i + k])] for i in range(0, len(pieces), k)])
    return [sorted(itertools.chain(*parts)) for parts in zip(*drawn, strict=True)]


def test_the_global_batch_depends_on_seed_and_update_alone() -> None:
    expected = global_batches(1)
    assert len(expected) == 200 // 24
    assert all(len(batch) == 24 for batch in expected)
    assert len(set(itertools.chain(*expected))) == 24 * len(expected)
    for world_size, more in ((2, {}), (3, {"micro_batches": 2}), (4, {"tokens": 64}), (5, {})):
        assert global_batches(world_size, **more) == expected
    assert global_batches(2, epoch=1) != expected
    assert global_batches(2, start=3) == expected[3:]


def best(lengths: list[int], pieces: int) -> int:
    """The smallest largest piece, by trying every way to cut the sorted examples."""
    widths = sorted(lengths, reverse=True)
    found = []
    for places in itertools.combinations(range(1, len(widths)), pieces - 1):
        edges = [0, *places, len(widths)]
        found.append(max((b - a) * widths[a] for a, b in itertools.pairwise(edges)))
    return min(found)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 9])
def test_a_batch_is_cut_as_well_as_can_be(pieces: int) -> None:
    for seed in range(20):
        lengths = random_lengths(seed, 9)
        found = cut(lengths, pieces)
        assert len(found) == pieces
        assert sorted(itertools.chain(*found)) == list(range(9))
        assert all(found)
        assert max(len(p) * max(lengths[i] for i in p) for p in found) == best(lengths, pieces)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_scaled_pieces_mean_is_the_global_batch_s_mean(
    world_size: int, micro_batches: int, counted: bool, packed: bool
) -> None:
    losses = [float(n) ** 0.5 for n in LENGTHS]
    counts = [1 + n * n % 37 for n in LENGTHS] if counted else None
    (sampler, *_) = samplers(world_size, micro_batches=micro_batches, counts=counts, packed=packed)
    for update, batch in enumerate(global_batches(1)):
        hands = deal([LENGTHS[i] for i in batch], world_size, micro_batches, packed)
        assert sorted(itertools.chain(*itertools.chain(*hands))) == list(range(24))
        sums = [[sampler.scale(update) * sum(losses[batch[i]] for i in piece) for piece in hand] for hand in hands]
        engine = sum(sum(hand) / micro_batches for hand in sums) / world_size  # what accelerate and DDP make of it
        counted_in = sum(counts[i] for i in batch) if counts else len(batch)
        assert engine == pytest.approx(sum(losses[i] for i in batch) / counted_in)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 9])
def test_packed_examples_are_spread_evenly(pieces: int) -> None:
    for seed in range(20):
        lengths = random_lengths(seed, 40)
        found = spread(lengths, pieces)
        assert sorted(itertools.chain(*found)) == list(range(40))
        sizes = [sum(lengths[i] for i in piece) for piece in found]
        assert max(sizes) - min(sizes) <= max(lengths)


LONG_TAILED = [*random_lengths(5, 400), 4096, 1500, 900, *([700] * 9)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("lengths", "tokens"), [(LENGTHS, 300), (LENGTHS, 40), (LONG_TAILED, 1000)])
def test_no_micro_batch_has_more_tokens_than_allowed_or_than_the_longest_example(
    lengths: list[int], tokens: int, world_size: int, packed: bool
) -> None:
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            lengths, 24, rank=rank, world_size=world_size, seed=3, tokens=tokens, packed=packed, epochs=3
        )
        assert sampler.micro_batches < 24 // world_size or tokens < 120
        for epoch in range(3):
            sampler.epoch = epoch
            for place, piece in enumerate(sampler):
                held = [lengths[i] for i in piece]
                size = sum(held) if packed else max(held) * len(held)
                longest = max(lengths[i] for i in sampler._drawn(place // sampler.micro_batches))
                assert size <= max(tokens, longest)


def test_one_long_example_among_short_ones_is_a_micro_batch_of_its_own() -> None:
    sampler = GlobalBatchSampler([4096, *[30] * 63], 64, rank=0, world_size=1, seed=0, tokens=16_384)
    assert sorted(map(len, sampler)) == [1, 63]
    even = GlobalBatchSampler([256] * 64, 64, rank=0, world_size=1, seed=0, tokens=16_384)
    assert even.micro_batches == 1  # nothing is cut without need


def waste(lengths: list[int], world_size: int) -> tuple[float, float]:
    """Real over padded tokens, and how much more the busiest rank of a step has than the average."""
    sampler = GlobalBatchSampler(lengths, 64, tokens=256, rank=0, world_size=world_size, seed=0)
    real = padding = busiest = average = 0.0
    for start in range(0, len(lengths) - 63, 64):
        batch = lengths[start : start + 64]
        hands = deal(batch, world_size, sampler.micro_batches)
        loads = [sum(len(p) * max(batch[i] for i in p) for p in hand) for hand in hands]
        real, padding = real + sum(batch), padding + sum(loads)
        busiest, average = busiest + max(loads), average + sum(loads) / world_size
    return real / padding, busiest / average - 1


@pytest.mark.parametrize("task", ["demo", "cola", "rte", "stsb"])
def test_little_is_padded_and_no_rank_waits_for_another(task: str, glue: Path) -> None:
    """Two ranks and batches of 64, with the main job's default for a CPU and the demo's tokenizer."""
    data = load_data(DataConfig(task=task, path=str(glue) if task != "demo" else None), seed=0)
    split = data.train.shuffle(seed=0).select(range(1920))
    columns = [list(split[name]) for name in ("text", "text_pair") if name in split.column_names]
    tokenizer = AutoTokenizer.from_pretrained(resolve_name("demo"))
    lengths = [len(tokens) for tokens in tokenizer(*columns, truncation=True, max_length=128)["input_ids"]]
    used, imbalance = waste(lengths, world_size=2)
    assert used >= 0.80
    assert imbalance <= 0.10


def test_lengths_are_rounded_up_as_a_batch_is() -> None:
    assert [padded(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    assert [padded(n, 1) for n in (1, 8, 9)] == [1, 8, 9]
