"""The scores of Eq. 2-4 as an engine shards gradients: observed by fragment, summed over ranks, kept by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..engines import Engine, Move, place
from ..engines.transfer import Piece
from ..freezing import FreezingConfig, FreezingScore
from ..freezing.quantile import quantile
from ..freezing.score import averages


class Scores:
    """Ibar and Ubar of all that may still freeze; of each matrix a rank holds what it holds of its gradient.

    Args:
        numels: Elements of each matrix that may freeze, whole, by name.

    Attributes:
        names: Of the matrices that are scored now.
        shards: This rank's part, one for each of the engine's buckets.
    """

    def __init__(self, engine: Engine, config: FreezingConfig, numels: Mapping[str, int]) -> None:
        self.engine, self.config, self.numels = engine, config, numels
        self._kinds = averages(config.window)
        self._lay_out(numels)

    def _lay_out(self, names: Iterable[str], begun: int = 0, observed: int = 0) -> None:
        """Begin at zero, with these matrices, as the engine's buckets are now."""
        self.names = list(names)
        config = self.config
        self.shards = [
            FreezingScore(
                fragments,
                device,
                kind=config.score,
                beta1=config.beta1,
                beta2=config.beta2,
                window=config.window,
            )
            for fragments, device in zip(self.engine.buckets(self.names), self.engine.bucket_devices(), strict=True)
        ]
        for shard in self.shards:
            shard.begun, shard.observed = begun, observed

    def device(self, bucket: int) -> torch.device:
        """Where a bucket is scored."""
        return self.shards[bucket].smoothed.device

    def observe(
        self,
        bucket: int,
        gradients: Sequence[Tensor],
        weights: Callable[[], Sequence[Tensor]],
        scale: Tensor | float,
        step: int,
    ) -> None:
        """Eq. 2 and 3 for one bucket of the global batch `step`, as an engine's `Observer` is told of it."""
        values = None if self.config.score == "gradient" else weights()
        self.shards[bucket].observe(gradients, values, scale, step)

    def means(self) -> dict[str, float]:
        """Eq. 4 of every matrix: one all-reduce of as many numbers. A collective; finite or not."""
        index = {name: i for i, name in enumerate(self.names)}
        vector = torch.zeros(len(self.names), dtype=torch.float64)
        for shard in self.shards:
            for name, partial in shard.partial_sums().items():
                vector[index[name]] += partial
        with torch.profiler.record_function("aflora.all_reduce"):
            self.engine.sum_over_ranks(vector)
        return {name: total / self.numels[name] for name, total in zip(self.names, vector.tolist(), strict=True)}

    def quantile(self, fraction: float) -> float:
        """Of the elements' Ibar * Ubar, of all matrices. A collective."""
        products = [shard.smoothed * shard.uncertainty for shard in self.shards]
        return quantile(products, fraction, self.engine.sum_over_ranks)

    def carry(self, moves: Sequence[Move], names: Iterable[str]) -> None:
        """Have the averages follow their gradients after a drop, those of these matrices. A collective."""
        old = self.shards
        self._lay_out(names, **self.window())
        moves = [move for move in moves if move.fragment.name in self.numels]
        for kind in self._kinds:
            source = place((shard.averages[kind], shard.spans()) for shard in old)
            target = place((shard.averages[kind], shard.spans()) for shard in self.shards)
            self.engine.carry(moves, source, target)

    # -- what survives a restart -------------------------------------------------------------

    def window(self) -> dict[str, int]:
        """Which window of importances is being averaged, and how many steps of it have been. A collective."""
        if self.config.window == 1:
            return {"begun": 0, "observed": 0}
        mine = max(((shard.begun, shard.observed) for shard in self.shards), default=(0, 0))
        begun, observed = self.engine.max_over_ranks(torch.tensor(mine, dtype=torch.int64)).tolist()
        return {"begun": begun, "observed": observed}

    def snapshot(self) -> dict[str, Tensor]:
        """Whole averages ("smoothed/NAME", "uncertainty/NAME") on the main process. A collective."""
        return self.engine.collect(self._pieces(), self._numels())

    def restore(self, tensors: Mapping[str, Tensor], names: Iterable[str], window: Mapping[str, int]) -> None:
        """Go on with these matrices from what `snapshot` and `window` gave. A collective."""
        self._lay_out(names, **window)
        self.engine.fill(tensors, list(self._numels()), self._pieces())

    def _numels(self) -> dict[str, int]:
        """Sizes by the names that a snapshot has; the same where this rank holds nothing."""
        return {f"{kind}/{name}": self.numels[name] for kind in self._kinds for name in self.names}

    def _pieces(self) -> list[Piece]:
        return [
            Piece(f"{kind}/{fragment.name}", fragment.start, average[at : at + fragment.numel])
            for shard in self.shards
            for fragment, at in shard.spans()
            for kind, average in shard.averages.items()
        ]
