"""Who freezes: the lowest scores first, ties by name, matrices singly or in pairs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class FreezingPolicy:
    """Chooses which projection matrices to freeze next.

    Args:
        names: All freezable matrices. Names end in the matrix, ".A" or ".B".
        pairwise: Freeze A and B of a layer together (Table 6); a pair's score is its mean.
    """

    def __init__(self, names: Sequence[str], *, pairwise: bool = False) -> None:
        self.units: dict[str, tuple[str, ...]] = {}
        for name in names:
            unit = name.rpartition(".")[0] if pairwise else name
            self.units[unit] = (*self.units.get(unit, ()), name)

    def __len__(self) -> int:
        """N of Eq. 5: how many matrices, or pairs, freeze one after the other."""
        return len(self.units)

    def next_frozen(self, scores: Mapping[str, float], count: int) -> list[str]:
        """The names to freeze, in order of rising score, so that `count` units are frozen in all.

        Args:
            scores: Score of each matrix that is still trainable (Eq. 4).
            count: floor(r(t) N).
        """
        remaining = {unit: names for unit, names in self.units.items() if names[0] in scores}
        missing = count - (len(self.units) - len(remaining))
        ranked = sorted(
            remaining, key=lambda unit: (sum(scores[n] for n in self.units[unit]) / len(self.units[unit]), unit)
        )
        return [name for unit in ranked[: max(missing, 0)] for name in self.units[unit]]
