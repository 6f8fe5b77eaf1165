"""Scores that are there before training: an order to freeze in, and controls that a gradient's score is to beat. Pure.

They see no gradient, so they cost nothing and no rank needs to ask another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import get_args

from ..names import matrix_position, module_of
from ..options import ScoreKind, Unit


def fixed_scores(kind: ScoreKind, numels: Mapping[str, int], seed: int = 0) -> dict[str, float]:
    """The score of each matrix; the lowest freeze first.

    random: uniform in [0, 1), drawn once from the seed and the name (SHA-256), the same on every rank and engine.
    front_to_back: the number of the matrix's block; what lies in no numbered block comes first.
    smallest_first: how many elements it has.

    Args:
        numels: Elements of each freezable matrix, by name.
        seed: Of the random order.
    """
    if kind == "random":
        drawn = {name: hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8] for name in numels}
        return {name: int.from_bytes(bits, "big") / 2**64 for name, bits in drawn.items()}
    if kind == "front_to_back":
        return {name: float(matrix_position(name).layer) for name in numels}
    assert kind == "smallest_first", kind
    return {name: float(numel) for name, numel in numels.items()}


def unit_of(name: str, unit: Unit) -> str:
    """What freezes together with this matrix: itself, all of its layer (A and B, Table 6), or all of its block.

    >>> unit_of("base_model.model.layers.0.mlp.up_proj.aflora.default.A", "layer")
    'base_model.model.layers.0.mlp.up_proj'
    >>> unit_of("base_model.model.layers.0.mlp.up_proj.lora_A.default.weight", "layer")
    'base_model.model.layers.0.mlp.up_proj'
    >>> unit_of("model.layers.0.mlp.up_proj.weight", "block")
    'model.layers.0'
    """
    assert unit in get_args(Unit), unit
    if unit == "matrix":
        return name
    if unit == "layer":
        return module_of(name)
    found = matrix_position(name)
    return f"{found.stack}.{found.layer}" if found.layer >= 0 else module_of(name)
