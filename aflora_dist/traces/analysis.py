"""From events to numbers per step: where a rank's time goes, what it sends, and for whom it waits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .intervals import Interval, covered, covers, difference, intersection, total, union
from .reader import Collective, RankTrace

# What may lie in a window and belongs to no update.
ASIDE = ("aflora.evaluate", "aflora.save")
_ROUNDING = 0.01  # microseconds: times are that exact in a double

Path = tuple[str, ...]


@dataclass(frozen=True)
class RangeTime:
    """A range, by the ranges around it: ("optimizer", "aflora.decide"). Per step.

    Attributes:
        device_ms: Duration of the work that the host asked the GPU for within the range, added up; None without one.
    """

    path: Path
    calls: float
    host_ms: float
    device_ms: float | None


@dataclass(frozen=True)
class Traffic:
    """The communication of one kind, per step; elements are the numbers that this rank gave (None: not recorded)."""

    kind: str
    calls: float
    total_ms: float
    exposed_ms: float
    elements: float | None


@dataclass(frozen=True)
class RankReport:
    """A rank's window, per step. computing + exposed + idle = step.

    Attributes:
        step_ms: From one update to the next, without evaluation and checkpoints.
        computing_ms: The GPU works, communication aside; without a GPU the main thread is in an operator.
        communication_ms: Communication is under way.
        exposed_ms: ... and nothing computes meanwhile.
        idle_ms: Neither: the GPU has nothing to do; without a GPU the main thread is in Python.
        operators: Operators that the main thread called (those that operators call not counted).
        launches: Kernels and copies on the GPU; None without one.
        aside_ms: Evaluation and checkpoints that lay in the window, whole; left out of everything else.
    """

    rank: int
    steps: int
    step_ms: float
    computing_ms: float
    communication_ms: float
    exposed_ms: float
    idle_ms: float
    operators: float
    launches: float | None
    aside_ms: float
    ranges: tuple[RangeTime, ...]
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class WindowReport:
    """A window on all ranks that have a trace of it.

    Attributes:
        waits_ms: {rank: {other: time per step that rank spent in collectives because other came last}}; None where
            only one rank recorded, or the ranks' collectives are not the same.
    """

    name: str
    ranks: tuple[RankReport, ...]
    waits_ms: dict[int, dict[int, float]] | None


def report_rank(trace: RankTrace) -> RankReport:
    """All of a rank's numbers. What began before the first step or lies in an evaluation does not count.

    On a GPU the window is the host's: the work that ran late into it from the step before stands for what the last
    step leaves to be done after it.
    """
    recorded = union(trace.steps)
    aside = intersection(recorded, union((start, end) for name, start, end in trace.ranges if name in ASIDE))
    window = difference(recorded, aside)
    steps = len(trace.steps)
    scale = 1e-3 / steps
    operators = union(trace.operators)
    computing = intersection(union(trace.device) if trace.launched else operators, window)
    communication = intersection(union((c.start, c.end) for c in trace.collectives), window)
    exposed = difference(communication, computing)
    step, busy = total(window), total(computing) + total(exposed)
    return RankReport(
        rank=trace.rank,
        steps=steps,
        step_ms=step * scale,
        computing_ms=total(computing) * scale,
        communication_ms=total(communication) * scale,
        exposed_ms=total(exposed) * scale,
        idle_ms=(step - busy) * scale,
        operators=_outermost(trace.operators, window) / steps,
        launches=sum(covers(window, start) for _, start, _ in trace.launched) / steps if trace.launched else None,
        aside_ms=total(aside) * 1e-3,
        ranges=_range_times(trace, window),
        traffic=_traffic(trace, window, computing),
    )


def _outermost(intervals: Sequence[Interval], window: list[Interval]) -> int:
    """How many of one thread's nested intervals lie in no other one."""
    count, end = 0, -math.inf
    for a, b in sorted(intervals, key=lambda interval: (interval[0], -interval[1])):
        if b > end + _ROUNDING:
            count += covers(window, a)
            end = b
    return count


def _range_times(trace: RankTrace, window: list[Interval]) -> tuple[RangeTime, ...]:
    found: dict[Path, list[Interval]] = defaultdict(list)
    around: list[tuple[str, float]] = []
    for name, start, end in sorted(trace.ranges, key=lambda r: (r[1], -r[2])):
        while around and around[-1][1] < end - _ROUNDING:
            around.pop()
        around.append((name, end))
        if covers(window, start):
            found[tuple(outer for outer, _ in around)].append((start, end))
    asked = sorted((at, duration) for at, _, duration in trace.launched if not math.isnan(at))
    moments = [at for at, _ in asked]
    scale = 1e-3 / len(trace.steps)

    def on_device(intervals: list[Interval]) -> float | None:
        if not trace.launched:
            return None
        return sum(duration for interval in intervals for _, duration in asked[covered(moments, interval)]) * scale

    return tuple(
        RangeTime(path, len(intervals) / len(trace.steps), total(intervals) * scale, on_device(intervals))
        for path, intervals in found.items()
    )


def _traffic(trace: RankTrace, window: list[Interval], computing: list[Interval]) -> tuple[Traffic, ...]:
    kinds: dict[str, list[Collective]] = defaultdict(list)
    for collective in trace.collectives:
        if covers(window, collective.start):
            kinds[collective.kind].append(collective)
    steps = len(trace.steps)
    traffic = []
    for kind, collectives in kinds.items():
        times = intersection(union((c.start, c.end) for c in collectives), window)
        elements = [c.elements for c in collectives if c.elements is not None]
        traffic.append(
            Traffic(
                kind,
                len(collectives) / steps,
                total(times) * 1e-3 / steps,
                total(difference(times, computing)) * 1e-3 / steps,
                sum(elements) / steps if len(elements) == len(collectives) else None,
            )
        )
    return tuple(sorted(traffic, key=lambda t: -t.total_ms))


_POINT_TO_POINT = ("send", "recv", "send and recv")


def waits(traces: Sequence[RankTrace]) -> dict[int, dict[int, float]] | None:
    """How long each rank waits for which, ms per step; None where their collectives are not the same.

    A collective ends on all ranks at about the same time, so the last rank to come is the one on which it takes
    least; what it takes longer on another rank, that rank has waited. This compares no clocks. Sends between two ranks
    are left out: they say nothing about the others.
    """
    asked = {trace.rank: _asked_for(trace) for trace in traces}
    found: dict[int, dict[int, float]] = {rank: {} for rank in asked}
    scale = 1e-3 / max(len(trace.steps) for trace in traces)
    kinds = {c.kind for mine in asked.values() for c in mine}
    for kind in kinds:
        of_kind = [[c for c in mine if c.kind == kind] for mine in asked.values()]
        if len({len(mine) for mine in of_kind}) > 1:
            return None
        for same in zip(*of_kind, strict=True):
            took = {rank: c.end - c.start for rank, c in zip(asked, same, strict=True)}
            last = min(took, key=lambda rank: took[rank])
            for rank, duration in took.items():
                if rank != last:
                    found[rank][last] = found[rank].get(last, 0.0) + (duration - took[last]) * scale
    return found


def _asked_for(trace: RankTrace) -> list[Collective]:
    """The collectives that all ranks take part in, in the order in which this one's updates asked for them.

    Those of one kind that are under way at once (several process groups over gloo) are told apart by their size.
    """
    window = difference(union(trace.steps), union((a, b) for name, a, b in trace.ranges if name in ASIDE))
    asked = [c for c in trace.collectives if c.kind not in _POINT_TO_POINT and covers(window, c.asked)]
    return sorted(asked, key=lambda c: (c.elements or 0, c.asked))
