"""The tables of `aflora trace`, for a terminal and for a page: windows side by side, by range, kind and rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .analysis import Path, RangeTime, RankReport, WindowReport


@dataclass(frozen=True)
class Cell:
    """Text, and the share of a bar to draw beside it where there is room for one."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Sheet:
    """A table; the first `names` columns are text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    names: int = 1


def sheets(windows: Sequence[WindowReport], rank: int | None = None) -> list[Sheet]:
    """All tables: means over the ranks, or one rank's; the last one has a line for each rank."""
    return [*compared(windows, rank), communication(windows, rank), ranks(windows)]


def compared(windows: Sequence[WindowReport], rank: int | None = None) -> list[Sheet]:
    """The step and its ranges, a column for each window and one for each later window over the first."""
    of = "mean over ranks" if rank is None else f"rank {rank}"
    on_device = any(r.launches is not None for w in windows for r in w.ranks)
    found = [_Ranks(window, rank) for window in windows]
    columns = tuple(_short(window.name) for window in windows)
    ratios = tuple(f"{name}/{columns[0]}" for name in columns[1:])
    who = "the GPU works" if on_device else "the main thread is in operators"
    neither = "it has nothing to do" if on_device else "it is in Python"
    note = f"computing: {who}; exposed: communication meanwhile, and no computing; idle: {neither}"
    step = [
        _row("step", [f.mean(lambda r: r.step_ms) for f in found]),
        _row("computing", [f.mean(lambda r: r.computing_ms) for f in found], found),
        _row("exposed communication", [f.mean(lambda r: r.exposed_ms) for f in found], found),
        _row("idle", [f.mean(lambda r: r.idle_ms) for f in found], found),
        _row("all communication", [f.mean(lambda r: r.communication_ms) for f in found], found),
        _row("operators called", [f.mean(lambda r: r.operators) for f in found]),
    ]
    if on_device:
        step.append(_row("kernels and copies", [f.mean(lambda r: r.launches or 0.0) for f in found]))
    paths = _tree(windows)
    host = [_row(_indented(path), [f.host_ms(path) for f in found], found) for path in paths]
    host.append(_row("outside of these", [f.outside_ms() for f in found], found))
    tables = [
        Sheet(f"A step, ms ({of})", ("", *columns, *ratios), tuple(step), note),
        Sheet(f"Ranges on the host, ms per step ({of})", ("", *columns, *ratios), tuple(host)),
    ]
    if on_device:
        device = [_row(_indented(path), [f.device_ms(path) for f in found], found) for path in paths]
        tables.append(Sheet(f"Ranges on the GPU, ms per step ({of})", ("", *columns, *ratios), tuple(device)))
    return tables


def communication(windows: Sequence[WindowReport], rank: int | None = None) -> Sheet:
    """By kind: how often, how long, how much of it exposed, how many numbers a rank gives."""
    rows = []
    for window in windows:
        found = _Ranks(window, rank)
        kinds = dict.fromkeys(t.kind for r in found.ranks for t in r.traffic)
        for kind in kinds:
            mine = [t for r in found.ranks for t in r.traffic if t.kind == kind]
            count = len(found.ranks)
            elements = [t.elements for t in mine if t.elements is not None]
            rows.append(
                (
                    Cell(_short(window.name)),
                    Cell(kind),
                    Cell(_number(sum(t.calls for t in mine) / count)),
                    Cell(_number(sum(t.total_ms for t in mine) / count)),
                    Cell(_number(sum(t.exposed_ms for t in mine) / count)),
                    Cell(f"{sum(elements) / count:,.0f}" if len(elements) == len(mine) else "-"),
                )
            )
    of = "mean over ranks" if rank is None else f"rank {rank}"
    columns = ("window", "kind", "calls", "ms", "exposed ms", "numbers given")
    return Sheet(f"Communication per step ({of})", columns, tuple(rows), "" if rows else "There is none.", names=2)


def ranks(windows: Sequence[WindowReport]) -> Sheet:
    """A line for each window and rank, with the ranks that it waits for."""
    rows = []
    for window in windows:
        for r in window.ranks:
            waits = (window.waits_ms or {}).get(r.rank, {})
            most = sorted(waits, key=lambda other: -waits[other])[:3]
            rows.append(
                (
                    Cell(_short(window.name)),
                    Cell(str(r.rank)),
                    Cell(_number(r.step_ms)),
                    *(_part(value, r.step_ms) for value in (r.computing_ms, r.exposed_ms, r.idle_ms)),
                    Cell("-" if window.waits_ms is None else _number(sum(waits.values()))),
                    Cell(", ".join(f"{other}: {_number(waits[other])}" for other in most) or "-"),
                )
            )
    columns = ("window", "rank", "step", "computing", "exposed", "idle", "waits", "for rank")
    note = "waits: what collectives take longer on this rank than on the one that comes to them last"
    return Sheet("Ranks, ms per step", columns, tuple(rows), note, names=2)


class _Ranks:
    """The ranks of a window that a table is about, and means over them."""

    def __init__(self, window: WindowReport, rank: int | None) -> None:
        self.ranks = [r for r in window.ranks if rank is None or r.rank == rank]

    def mean(self, value: Callable[[RankReport], float]) -> float | None:
        return fmean(map(value, self.ranks)) if self.ranks else None

    @property
    def step_ms(self) -> float | None:
        return self.mean(lambda r: r.step_ms)

    def host_ms(self, path: Path) -> float | None:
        return self._of_range(path, lambda t: t.host_ms)

    def device_ms(self, path: Path) -> float | None:
        return self._of_range(path, lambda t: t.device_ms or 0.0)

    def _of_range(self, path: Path, value: Callable[[RangeTime], float]) -> float | None:
        times = [value(t) for r in self.ranks for t in r.ranges if t.path == path]
        return sum(times) / len(self.ranks) if times else None

    def outside_ms(self) -> float | None:
        return self.mean(lambda r: r.step_ms - sum(t.host_ms for t in r.ranges if len(t.path) == 1))


def _row(name: str, values: Sequence[float | None], of: Sequence[_Ranks] | None = None) -> tuple[Cell, ...]:
    cells = [Cell(name)]
    for i, value in enumerate(values):
        step = of[i].step_ms if of is not None else None
        cells.append(
            Cell("-" if value is None else _number(value)) if not step or value is None else _part(value, step)
        )
    first = values[0]
    cells += [Cell(f"{value / first:.2f}" if value is not None and first else "-") for value in values[1:]]
    return tuple(cells)


def _part(value: float, whole: float) -> Cell:
    share = value / whole if whole else 0.0
    return Cell(f"{_number(value)} {share:4.0%}", share)


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}" if value else "0"


def _short(window: str) -> str:
    """`1_before` is before, `2_from_30` from_30."""
    number, _, name = window.partition("_")
    return name if number.isdigit() and name else window


def _indented(path: Path) -> str:
    return "  " * (len(path) - 1) + path[-1]


def _tree(windows: Sequence[WindowReport]) -> list[Path]:
    """All paths of all ranks, each after the one around it, else as they come in time."""
    children: dict[Path, dict[Path, None]] = {(): {}}
    for path in (t.path for window in windows for r in window.ranks for t in r.ranges):
        for depth in range(1, len(path) + 1):
            children.setdefault(path[: depth - 1], {})[path[:depth]] = None
    ordered: list[Path] = []

    def walk(path: Path) -> None:
        for child in children.get(path, {}):
            ordered.append(child)
            walk(child)

    walk(())
    return ordered
