"""The same global batch, distributed by length: which examples make up an update, and which rank computes which.

Which examples are in the global batch depends on the seed and the update alone, so that nothing is biased (as it is
where whole batches are grouped by length). Within it they are sorted by length and cut into pieces, one for each
micro-batch of each rank, so that little is padded and no rank waits for another. Pieces differ in size: their losses
are summed up, and the sum is scaled, see `scale`.

transformers' BatchRebalanceSampler distributes a global batch likewise, but takes the number of micro-batches as given,
moves single examples between pieces until it is stuck where `cut` finds the smallest largest piece, and leaves the
weights to the model's loss, of which a regression's knows none. So it is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


def padded(length: int, multiple: int) -> int:
    """What an example of so many tokens takes in a batch in which it is the longest."""
    return -(-length // multiple) * multiple


def cut(lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """Cut examples into pieces whose largest has as few padded tokens as can be.

    Args:
        lengths: Tokens of each example, rounded up as a batch is.
        pieces: How many; at most as many as there are examples.

    Returns:
        The examples' positions, piece by piece, the longest first; none is empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    widths = [lengths[i] for i in order]
    low, high = max(widths), max(widths) * len(widths)
    while low < high:  # the smallest size that so many pieces can keep to
        middle = (low + high) // 2
        if len(_starts(widths, middle)) <= pieces:
            high = middle
        else:
            low = middle + 1
    starts = _starts(widths, low)
    found = [order[a:b] for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]
    while len(found) < pieces:  # halve the largest that can be
        largest = max((p for p in found if len(p) > 1), key=lambda p: len(p) * lengths[p[0]])
        at, half = found.index(largest), len(largest) // 2
        found[at : at + 1] = [largest[:half], largest[half:]]
    return found


def _starts(widths: Sequence[int], size: int) -> list[int]:
    """Where pieces begin if each takes as many examples, longest first, as fit into `size` padded tokens."""
    starts, at = [], 0
    while at < len(widths):
        starts.append(at)
        at += max(size // max(widths[at], 1), 1)
    return starts


def spread(lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """Cut examples into pieces of about equally many tokens, whatever the examples' own lengths: for packing."""
    found: list[list[int]] = [[] for _ in range(pieces)]
    totals = [0] * pieces
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(pieces), key=lambda p: (totals[p], p))
        found[lightest].append(i)
        totals[lightest] += lengths[i]
    return found


def deal(lengths: Sequence[int], ranks: int, micro_batches: int, packed: bool = False) -> list[list[list[int]]]:
    """rank -> its micro-batches -> positions in the global batch; ranks compute about equally many tokens.

    Args:
        packed: Examples are laid end to end in a micro-batch, instead of padded to the longest.
    """

    def size(piece: Sequence[int]) -> int:
        return sum(lengths[i] for i in piece) if packed else len(piece) * lengths[piece[0]]

    pieces = sorted((spread if packed else cut)(lengths, ranks * micro_batches), key=lambda p: (-size(p), p))
    hands: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for piece in pieces:
        rank = min((r for r in range(ranks) if len(hands[r]) < micro_batches), key=lambda r: (totals[r], r))
        hands[rank].append(piece)
        totals[rank] += size(piece)
    return hands


@functools.lru_cache(maxsize=1)
def _order(seed: int, epoch: int, examples: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(examples, generator=generator).tolist()


@functools.lru_cache(maxsize=16)  # of a plan's launches
def _needed(lengths: bytes, batch_size: int, seed: int, epochs: int, tokens: int, ranks: int, packed: bool) -> int:
    """Micro-batches of a rank that it takes for none to have more tokens than that, or than its update's longest.

    Args:
        lengths: int64, (examples,).
    """
    examples = np.frombuffer(lengths, dtype=np.int64)
    whole = len(examples) // batch_size * batch_size
    needed = 1
    for epoch in range(epochs if whole else 0):
        drawn = np.asarray(_order(seed, epoch, len(examples))[:whole]).reshape(-1, batch_size)
        widths = -np.sort(-examples[drawn], axis=1)
        if packed:
            while needed * ranks < batch_size and np.any(_fullest(widths, needed * ranks) > _room(widths, tokens)):
                needed += 1
        else:
            needed = max(needed, -(-_cuts(widths, tokens) // ranks))
    return needed


def _room(widths: Any, tokens: int) -> Any:
    return np.maximum(widths[:, 0], tokens)


def _cuts(widths: Any, tokens: int) -> int:
    """The most pieces that `_starts` makes of an update, (updates, examples)."""
    at, pieces = np.zeros(len(widths), dtype=np.int64), 0
    while (at < widths.shape[1]).any():
        next_width = np.take_along_axis(widths, np.minimum(at, widths.shape[1] - 1)[:, None], axis=1)[:, 0]
        at += np.maximum(tokens // np.maximum(next_width, 1), 1)
        pieces += 1
    return pieces


def _fullest(widths: Any, pieces: int) -> Any:
    """Tokens of the largest piece that `spread` makes of each update, (updates,)."""
    totals = np.zeros((len(widths), pieces), dtype=np.int64)
    rows = np.arange(len(widths))
    for width in widths.T:
        totals[rows, totals.argmin(axis=1)] += width
    return totals.max(axis=1)


class GlobalBatchSampler(Sampler[list[int]]):
    """This rank's micro-batches, update after update. The last, incomplete batch of an epoch is left out.

    Args:
        lengths: Tokens of each example of the training split, rounded up as a batch is.
        batch_size: Examples per update, over all ranks and micro-batches.
        micro_batches: Per update, on each rank, at least.
        tokens: How many tokens a micro-batch may have, padding included, or as many as the longest example of its
            update has: there are as many micro-batches as the update needs that needs most, the same number in every
            update, as ZeRO wants it.
        epochs: How many there will be.
        counts: What each example's loss is a sum over: its loss-carrying tokens; 1 if not given.
        packed: See `deal`.
        sizes: Tokens of each example, without padding; `lengths` if not given.

    Attributes:
        epoch, start: Where the next iteration begins: the epoch, and the updates of it that are done already.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        micro_batches: int = 1,
        tokens: int | None = None,
        epochs: int = 1,
        counts: Sequence[int] | None = None,
        packed: bool = False,
        sizes: Sequence[int] | None = None,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.lengths, self.sizes = lengths, lengths if sizes is None else sizes
        self.batch_size = batch_size
        self.counts, self.packed = counts, packed
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.epoch = 0
        self.start = 0
        needed = 1
        if tokens is not None:
            orders = np.asarray(lengths, dtype=np.int64).tobytes(), batch_size, seed, epochs
            needed = _needed(*orders, tokens, world_size, packed)
        self.micro_batches = max(micro_batches, min(needed, batch_size // world_size))

    @property
    def updates_per_epoch(self) -> int:
        return len(self.lengths) // self.batch_size

    def scale(self, update: int) -> float:
        """What makes a sum of losses this rank's share of the mean over the epoch's global batch number `update`.

        Engines average over ranks and micro-batches. Every rank knows every example's count: nothing is exchanged.
        """
        total = self.batch_size if self.counts is None else sum(self.counts[i] for i in self._drawn(update))
        return self.world_size * self.micro_batches / total

    def tokens(self, update: int) -> int:
        """Tokens of the epoch's global batch number `update` on all ranks, padding excluded."""
        return sum(self.sizes[i] for i in self._drawn(update))

    def _drawn(self, update: int) -> list[int]:
        """The examples of one of the epoch's global batches."""
        start = update * self.batch_size
        return _order(self.seed, self.epoch, len(self.lengths))[start : start + self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        for update in range(self.start, self.updates_per_epoch):
            batch = self._drawn(update)
            hands = deal([self.lengths[i] for i in batch], self.world_size, self.micro_batches, self.packed)
            yield from ([batch[i] for i in piece] for piece in hands[self.rank])

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.start) * self.micro_batches


class EvaluationSampler(Sampler[list[int]]):
    """This rank's batches of an evaluation split, the longest examples first; those of a round are alike on all ranks.

    Every rank has as many batches, as sharded engines want it: a rank that is left without an example in the last round
    computes one of another's, for nobody.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples in a batch of one rank.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, rank: int, world_size: int) -> None:
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        size = batch_size * world_size
        self.rounds = [order[start : start + size] for start in range(0, len(order), size)]
        self.rank, self.world_size = rank, world_size

    def shares(self) -> Iterator[list[int]]:
        """Of each batch, the examples whose result is this rank's to give: all, or none."""
        return (together[self.rank :: self.world_size] for together in self.rounds)

    def __iter__(self) -> Iterator[list[int]]:
        return (mine or together[-1:] for mine, together in zip(self.shares(), self.rounds, strict=True))

    def __len__(self) -> int:
        return len(self.rounds)
