"""Scores that are there before training: an order to freeze in, and controls that a gradient's score is to beat. Pure.

They see no gradient, so they cost nothing and no rank needs to ask another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import get_args

from ..names import matrix_position, module_of, of_base
from ..options import ScoreKind, Unit


def fixed_scores(kind: ScoreKind, numels: Mapping[str, int], seed: int = 0) -> dict[str, float]:
    """The score of each matrix; the lowest freeze first.

    random: uniform in [0, 1), drawn once from the seed and the name (SHA-256), the same on every rank and engine.
    front_to_back: the place of the matrix's block from the front, 0, 1, ...: by the stacks of the model in their order,
    and by all numbers in the name, as in a ModuleList; what is in no numbered block comes first.
    smallest_first: how many elements it has.

    Args:
        numels: Elements of each freezable matrix, by name.
        seed: Of the random order.
    """
    if kind == "random":
        drawn = {name: hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8] for name in numels}
        return {name: int.from_bytes(bits, "big") / 2**64 for name, bits in drawn.items()}
    if kind == "front_to_back":
        return {name: float(place) for name, place in _from_the_front(list(numels)).items()}
    assert kind == "smallest_first", kind
    return {name: float(numel) for name, numel in numels.items()}


def _from_the_front(names: Sequence[str]) -> dict[str, int]:
    """The place of each matrix's block.

    >>> _from_the_front(["layers.10.weight", "layers.9.weight", "head.weight"])
    {'layers.10.weight': 2, 'layers.9.weight': 1, 'head.weight': 0}
    """
    keys: dict[str, tuple[int, ...]] = {}
    stacks: dict[str, int] = {}
    for name in names:
        parts = module_of(of_base(name)).split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        numbers = [int(part) for part in parts[first:] if part.isdigit()]
        stack = stacks.setdefault(".".join(parts[:first]), len(stacks)) if numbers else -1
        keys[name] = (stack, *numbers)
    places = {key: place for place, key in enumerate(sorted({*keys.values()}))}
    return {name: places[key] for name, key in keys.items()}


def unit_of(name: str, unit: Unit) -> str:
    """What freezes together with this matrix: itself, all of its layer (A and B, Table 6), or all of its block.

    >>> unit_of("base_model.model.layers.0.mlp.up_proj.aflora.default.A", "layer")
    'base_model.model.layers.0.mlp.up_proj'
    >>> unit_of("base_model.model.layers.0.mlp.up_proj.lora_A.default.weight", "layer")
    'base_model.model.layers.0.mlp.up_proj'
    >>> unit_of("model.layers.0.mlp.up_proj.weight", "block"), unit_of("0.mlp.up_proj.weight", "block")
    ('model.layers.0', '0')
    """
    assert unit in get_args(Unit), unit
    if unit == "matrix":
        return name
    if unit == "layer":
        return module_of(name)
    found = matrix_position(name)
    return f"{found.stack}.{found.layer}".lstrip(".") if found.layer >= 0 else module_of(name)
