"""Paired differences, and what may be said of them. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

LEVEL = 0.05  # a table without any difference claims one at most that often
_DIGITS = 1e-5  # of a value: what less comes of is how results are rounded


@dataclass(frozen=True)
class Difference:
    """A mean difference of two methods over the seeds that both have.

    Attributes:
        low, high: Its 95% interval, by Student's t; None where fewer than two seeds are there, or all say the same.
        p: Two-sided, for no difference; None likewise.
        corrected: p after `corrected_for`; None: not yet.
    """

    mean: float
    seeds: int
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None

    @property
    def alike(self) -> bool:
        """Whether it is the same on each of several seeds, as metrics that are counts may be: p says nothing then."""
        return self.seeds > 1 and self.p is None

    @property
    def seen(self) -> bool:
        return self.corrected is not None and self.corrected < LEVEL


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs, seed by seed; None where no seed is in both."""
    found = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not found:
        return None
    mean, n = statistics.fmean(found), len(found)
    if n < 2:
        return Difference(mean, n)
    error = statistics.stdev(found) / math.sqrt(n)
    size = max(abs(value) for of_method in (ours, theirs) for value in of_method.values())
    if error <= _DIGITS * size:  # metrics are counts: that they agree says nothing of how far they would scatter
        return Difference(mean, n)
    from scipy.special import stdtr, stdtrit  # takes a moment, and only tables need it

    half = float(stdtrit(n - 1, 1 - LEVEL / 2)) * error
    return Difference(mean, n, mean - half, mean + half, 2 * float(stdtr(n - 1, -abs(mean / error))))


def corrected_for(differences: Sequence[Difference]) -> list[Difference]:
    """With p corrected for their number, by Holm's method: the chance of any false claim among them stays at LEVEL."""
    order = sorted((i for i, one in enumerate(differences) if one.p is not None), key=lambda i: differences[i].p or 0.0)
    found, highest = [*differences], 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (differences[i].p or 0.0) * (len(order) - rank)))
        found[i] = replace(differences[i], corrected=highest)
    return found
