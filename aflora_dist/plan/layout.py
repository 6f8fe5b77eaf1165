"""Which elements of what trains each rank of an engine will hold. Arithmetic over sizes; no tensor is made.

Follows the engines' own layouts: engines/ddp.py, fsdp2.py, deepspeed/zero12.py and zero3.py. The tests compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .launches import EngineKind

Counts = NDArray[np.int64]
FLOAT32 = 4  # bytes


@dataclass(frozen=True, eq=False)
class Trained:
    """The parameters that train, param group by param group: an array each, with an entry for each of them.

    Attributes:
        numels, rows: Elements, and the size of the first dimension.
        itemsizes: Bytes of an element in the model.
        groups: Param groups of the optimizer.
        positions: Among all parameters of the model.
        freezable: Whether it is a projection matrix that will freeze.
        averages: How many float32 numbers the score keeps for each element of those: Ibar, Ubar, and with
            freezing.rule=quantile the average of a window.
        moments: How many numbers the optimizer keeps for each element of all: AdamW two.
    """

    numels: Counts
    rows: Counts
    itemsizes: Counts
    groups: Counts
    positions: Counts
    freezable: NDArray[np.bool_]
    averages: int = 2
    moments: int = 2

    @classmethod
    def of(cls, parameters: Sequence[tuple[Any, int, int, bool]], averages: int, moments: int = 2) -> Trained:
        """From (parameter, group, position, whether it is freezable)."""
        found = [
            (p.numel(), p.shape[0] if p.dim() else 1, p.element_size(), group, position, freezable)
            for p, group, position, freezable in parameters
        ]
        numels, rows, itemsizes, groups, positions, freezable = zip(*found, strict=True)
        a, b, c, d, e = (np.array(column, dtype=np.int64) for column in (numels, rows, itemsizes, groups, positions))
        return cls(a, b, c, d, e, np.array(freezable, dtype=bool), averages, moments)

    def only(self, chosen: NDArray[np.bool_]) -> Trained:
        """Those of them that are chosen."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.type != "int"}
        return replace(self, **{name: array[chosen] for name, array in arrays.items()})


def held(engine: EngineKind, trained: Trained, ranks: int) -> Counts:
    """(ranks, parameters): elements whose optimizer state each rank has."""
    numels, rank = trained.numels, _ranks(ranks)
    if engine in ("single", "ddp"):
        return np.tile(numels, (ranks, 1))
    if engine in ("zero1", "zero2"):
        starts, sizes = _flat(trained, ranks)
        return _overlap(starts, starts + numels, rank * sizes, (rank + 1) * sizes)
    if engine == "zero3":
        piece = -(-numels // ranks)
        return _between(numels - rank * piece, piece)
    piece = -(-trained.rows // ranks)
    return _between(trained.rows - rank * piece, piece) * (numels // trained.rows)


def observed(engine: EngineKind, trained: Trained, ranks: int) -> Counts:
    """(ranks, parameters): elements of freezable matrices that each rank scores."""
    if engine not in ("single", "ddp"):
        return held(engine, trained, ranks) * trained.freezable
    share = -(-trained.numels // ranks)
    starts = (_ranks(ranks) + trained.positions) % ranks * share
    return _between(trained.numels - starts, share) * trained.freezable


def moment_bytes(engine: EngineKind, trained: Trained, ranks: int) -> Counts:
    """(ranks,): bytes of the optimizer's moments."""
    return trained.moments * held(engine, trained, ranks) @ state_itemsizes(engine, trained)


def score_bytes(engine: EngineKind, trained: Trained, ranks: int) -> Counts:
    """(ranks,): bytes of Ibar, Ubar and the buffer in which importances are made, float32."""
    return observed(engine, trained, ranks).sum(1) * (trained.averages + bool(trained.averages)) * FLOAT32


def state_itemsizes(engine: EngineKind, trained: Trained) -> Counts:
    """(parameters,): bytes of an element of a moment, and of the value that the optimizer updates."""
    return np.full_like(trained.itemsizes, FLOAT32) if engine.startswith("zero") else trained.itemsizes


def _flat(trained: Trained, ranks: int) -> tuple[Counts, Counts]:
    """Where each parameter begins in its group's flat buffer, and the elements of a rank's partition of that buffer."""
    starts, sizes = np.zeros_like(trained.numels), np.zeros_like(trained.numels)
    for group in np.unique(trained.groups):
        here = trained.groups == group
        ends = np.cumsum(trained.numels[here])
        starts[here] = ends - trained.numels[here]
        sizes[here] = -(-ends[-1] // (2 * ranks)) * 2  # DeepSpeed fills up to a multiple of 2 x ranks
    return starts, sizes


def _ranks(ranks: int) -> Counts:
    return np.arange(ranks, dtype=np.int64)[:, None]


def _between(numbers: Counts, most: Counts) -> Counts:
    """Numbers from 0 to `most`."""
    return np.minimum(np.maximum(numbers, 0), most)


def _overlap(start: Counts, stop: Counts, low: Counts, high: Counts) -> Counts:
    return np.maximum(np.minimum(stop, high) - np.maximum(start, low), 0)
