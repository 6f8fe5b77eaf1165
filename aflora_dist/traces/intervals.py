"""Arithmetic of times: an interval is (start, end), a set of them is sorted and disjoint."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The times that any of the intervals covers, whatever their order and overlap."""
    merged: list[Interval] = []
    start = end = 0.0
    for a, b in sorted(intervals):
        if b <= a:
            continue
        if merged and a <= end:
            if b > end:
                end = b
                merged[-1] = (start, end)
        else:
            start, end = a, b
            merged.append((start, end))
    return merged


def intersection(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """The times that both sets cover."""
    return difference(one, difference(one, other))


def total(intervals: Iterable[Interval]) -> float:
    """The length of a set of intervals."""
    return sum(end - start for start, end in intervals)


def difference(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """The times of the first set that the second does not cover."""
    left = []
    j = 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if start < other[k][0]:
                left.append((start, other[k][0]))
            start = max(start, other[k][1])
            k += 1
        if start < end:
            left.append((start, end))
    return left


def covers(intervals: list[Interval], at: float) -> bool:
    """Whether a set covers a moment; an interval's end is outside."""
    i = bisect_right(intervals, at, key=lambda interval: interval[0]) - 1
    return i >= 0 and at < intervals[i][1]


def covered(sorted_times: list[float], interval: Interval) -> slice:
    """Which of the sorted moments an interval covers."""
    return slice(bisect_left(sorted_times, interval[0]), bisect_left(sorted_times, interval[1]))
