"""The scores of Eq. 2-4 as an engine shards gradients: observed by fragment, summed over ranks, kept by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines import Engine, Move, place
from ..engines.transfer import Piece
from ..freezing import FreezingConfig, FreezingScore, MatrixScore, PartialImportance, fixed_scores
from ..freezing.quantile import quantile
from ..freezing.score import OF_VALUES, averages
from ..notices import logger
from ..options import ORDERS


class Scores(ABC):
    """The scores of all that may still freeze.

    Args:
        numels: Elements of each matrix that may freeze, whole, by name.

    Attributes:
        names: Of the matrices that are scored now.
        devices: Where the gradients of each of the engine's buckets lie.
        shards: This rank's part, one for each of the engine's buckets; an order observes nothing.
        done: How many global batches have been; kept by who counts them.
    """

    shards: list[Any]

    def __init__(self, engine: Engine, config: FreezingConfig, numels: Mapping[str, int]) -> None:
        self.engine, self.config, self.numels = engine, config, numels
        self.done = 0
        self._told_of_idle = config.score in ORDERS  # where 0 says nothing
        self._decays = {"beta1": config.beta1, "beta2": config.beta2}
        self._keep(numels)

    def _keep(self, names: Iterable[str]) -> None:
        """Score these matrices from now on, as the engine lays them out now."""
        self.names, self.devices = list(names), self.engine.bucket_devices()

    def observe(
        self,
        bucket: int,
        gradients: Sequence[Tensor],
        weights: Callable[[], Sequence[Tensor]],
        scale: Tensor | float,
        step: int,
    ) -> None:
        """Eq. 2 and 3 for one bucket of the global batch `step`, as an engine's `Observer` is told of it."""
        values = weights() if self.config.score in OF_VALUES else None
        self.shards[bucket].observe(gradients, values, scale, step)

    @abstractmethod
    def means(self) -> dict[str, float]:
        """Eq. 4 of every matrix. A collective; finite or not."""

    def tell_of_idle(self, means: Mapping[str, float]) -> None:
        """Warn, once, of what freezes first because no gradient has ever reached it."""
        idle = [name for name, mean in means.items() if mean == 0.0]
        if not 0 < len(idle) < len(means) or self._told_of_idle:  # before the first update s_b is 0, and all of them
            return
        self._told_of_idle = True
        if self.engine.accelerator.is_main_process:
            more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
            logger.warning(
                f"{idle[0]}{more} have had no gradient so far, and freeze first: their layers were not called, or the "
                f"model reads their weights itself. Leave out what does not learn (exclude_modules, freezable=...)."
            )

    def quantile(self, fraction: float) -> float:
        """Of the elements' Ibar * Ubar, of all matrices. A collective."""
        raise NotImplementedError("FreezingOptions refuses this rule for such scores")

    def carry(self, moves: Sequence[Move], names: Iterable[str]) -> None:
        """Go on with these matrices after a drop. A collective."""
        self._keep(names)

    def record(self) -> dict[str, Any]:
        """What of them must survive a restart beside tensors, as JSON can hold it; on every rank. A collective."""
        return {}

    def snapshot(self) -> dict[str, Tensor]:
        """Tensors of the size of a matrix that must survive a restart, whole, on the main process. A collective."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor], names: Iterable[str], record: Mapping[str, Any]) -> None:
        """Go on with these matrices from what `snapshot` and `record` gave. A collective."""
        self._keep(names)


def scores_for(engine: Engine, config: FreezingConfig, numels: Mapping[str, int]) -> Scores:
    """What ranks these matrices under this configuration."""
    if config.score in ORDERS:
        return Order(engine, config, numels)
    return (
        MatrixScores(engine, config, numels)
        if config.granularity == "matrix"
        else ElementScores(engine, config, numels)
    )


class Order(Scores):
    """An order that is known before training: nothing is observed, kept or sent."""

    def means(self) -> dict[str, float]:
        in_order = {name: self.numels[name] for name in self.engine.parameters if name in self.numels}
        scores = fixed_scores(self.config.score, in_order, self.config.seed or 0)
        return {name: scores[name] for name in self.names}


class MatrixScores(Scores):
    """Two numbers for each matrix, the same on every rank; ranks ask each other when something is decided."""

    shards: list[PartialImportance]

    def __init__(self, engine: Engine, config: FreezingConfig, numels: Mapping[str, int]) -> None:
        super().__init__(engine, config, numels)
        self._score = MatrixScore(numels, **self._decays)
        self._lay_out()

    def _lay_out(self) -> None:
        self.shards = [PartialImportance(f, kind=self.config.score) for f in self.engine.buckets(self.names)]

    def _take(self) -> None:
        if self.done > self._score.begun:
            with torch.profiler.record_function("aflora.all_reduce"):
                self._score.take(self.shards, self.done, self.engine.sum_over_ranks)

    def means(self) -> dict[str, float]:
        self._take()
        return self._score.scores()

    def carry(self, moves: Sequence[Move], names: Iterable[str]) -> None:
        self._take()
        self._keep(names)
        self._score.keep(self.names)
        self._lay_out()

    def record(self) -> dict[str, Any]:
        self._take()
        return self._score.record()

    def restore(self, tensors: Mapping[str, Tensor], names: Iterable[str], record: Mapping[str, Any]) -> None:
        self._keep(names)
        self._score = MatrixScore({name: self.numels[name] for name in self.names}, **self._decays)
        self._score.load(record)
        self.done = self._score.begun  # whatever this process had done before
        self._lay_out()


class ElementScores(Scores):
    """Ibar and Ubar of each element; of each matrix a rank holds what it holds of its gradient."""

    shards: list[FreezingScore]

    def __init__(self, engine: Engine, config: FreezingConfig, numels: Mapping[str, int]) -> None:
        super().__init__(engine, config, numels)
        self._kinds = averages(config.window, config.score)
        self._lay_out(numels)

    def _lay_out(self, names: Iterable[str], begun: int = 0, observed: int = 0) -> None:
        """Begin at zero, with these matrices, as the engine's buckets are now."""
        self._keep(names)
        config = self.config
        self.shards = [
            FreezingScore(fragments, device, kind=config.score, window=config.window, **self._decays)
            for fragments, device in zip(self.engine.buckets(self.names), self.devices, strict=True)
        ]
        for shard in self.shards:
            shard.begun, shard.observed = begun, observed

    def means(self) -> dict[str, float]:
        """Eq. 4 of every matrix: one all-reduce of as many numbers."""
        index = {name: i for i, name in enumerate(self.names)}
        vector = torch.zeros(len(self.names), dtype=torch.float64)
        for shard in self.shards:
            for name, partial in shard.partial_sums().items():
                vector[index[name]] += partial
        with torch.profiler.record_function("aflora.all_reduce"):
            self.engine.sum_over_ranks(vector)
        return {name: total / self.numels[name] for name, total in zip(self.names, vector.tolist(), strict=True)}

    def quantile(self, fraction: float) -> float:
        products = [shard.smoothed * shard.uncertainty for shard in self.shards]
        return quantile(products, fraction, self.engine.sum_over_ranks)

    def carry(self, moves: Sequence[Move], names: Iterable[str]) -> None:
        """The averages follow their gradients."""
        old = self.shards
        self._lay_out(names, **self.record())
        moves = [move for move in moves if move.fragment.name in self.numels]
        for kind in self._kinds:
            source = place((shard.averages[kind], shard.spans()) for shard in old)
            target = place((shard.averages[kind], shard.spans()) for shard in self.shards)
            self.engine.carry(moves, source, target)

    # -- what survives a restart -------------------------------------------------------------

    def record(self) -> dict[str, int]:
        """Which window of importances is being averaged, and how many steps of it have been."""
        if self.config.window == 1:
            return {"begun": 0, "observed": 0}
        mine = max(((shard.begun, shard.observed) for shard in self.shards), default=(0, 0))
        begun, observed = self.engine.max_over_ranks(torch.tensor(mine, dtype=torch.int64)).tolist()
        return {"begun": begun, "observed": observed}

    def snapshot(self) -> dict[str, Tensor]:
        """Whole averages ("smoothed/NAME", "uncertainty/NAME")."""
        return self.engine.collect(self._pieces(), self._numels())

    def restore(self, tensors: Mapping[str, Tensor], names: Iterable[str], record: Mapping[str, Any]) -> None:
        self._lay_out(names, **record)
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
