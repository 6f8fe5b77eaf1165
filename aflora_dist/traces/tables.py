"""The windows of a run side by side, as tables: by range, by kind of communication, by rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .analysis import Path, RankReport, WindowReport

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The first `names` columns are text, the others numbers."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    note: str = ""
    names: int = 1

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" if i < self.names else "---:" for i in range(len(self.columns))), *self.rows]
        cells = "\n".join("|" + "|".join(_escaped(cell) for cell in line) + "|" for line in lines)
        return "\n\n".join(part for part in (f"**{self.title}**", cells if self.rows else "", self.note) if part)


def tables(windows: Sequence[WindowReport]) -> list[Table]:
    """The step and its ranges, a column for each window; communication; and a line for each rank."""
    columns = tuple(short_name(window.name) for window in windows)
    columns = ("", *columns, *(f"{name}/{columns[0]}" for name in columns[1:]))
    on_device = any(r.launches is not None for w in windows for r in w.ranks)
    host = _ranges(windows, "host_ms")
    outside = [_mean(w, lambda r: r.step_ms - sum(t.host_ms for t in r.ranges if len(t.path) == 1)) for w in windows]
    host.append(_row("outside of these", outside, windows))
    found = [
        _steps(windows, columns, on_device),
        Table("Ranges on the host, ms per step (mean over ranks)", columns, tuple(host)),
    ]
    if on_device:
        device = tuple(_ranges(windows, "device_ms"))
        found.append(Table("Ranges on the GPU, ms per step (mean over ranks)", columns, device))
    return [*found, _communication(windows), _ranks(windows)]


def short_name(window: str) -> str:
    """`1_before` is before, `2_from_30` from_30."""
    number, _, name = window.partition("_")
    return name if number.isdigit() and name else window


def range_paths(windows: Sequence[WindowReport]) -> list[Path]:
    """All ranges of all ranks, each after the one around it, else as they come in time."""
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


def _steps(windows: Sequence[WindowReport], columns: Row, on_device: bool) -> Table:
    who = "the GPU works" if on_device else "the main thread is in operators"
    neither = "it has nothing to do" if on_device else "it is in Python"
    note = f"computing: {who}; exposed: communication meanwhile, and no computing; idle: {neither}"
    shares: dict[str, Callable[[RankReport], float]] = {
        "computing": lambda r: r.computing_ms,
        "exposed communication": lambda r: r.exposed_ms,
        "idle": lambda r: r.idle_ms,
        "all communication": lambda r: r.communication_ms,
    }
    rows = [_row("step", [_mean(w, lambda r: r.step_ms) for w in windows])]
    rows += [_row(name, [_mean(w, value) for w in windows], windows) for name, value in shares.items()]
    rows.append(_row("operators called", [_mean(w, lambda r: r.operators) for w in windows]))
    if on_device:
        rows.append(_row("kernels and copies", [_mean(w, lambda r: r.launches or 0.0) for w in windows]))
    return Table("A step, ms (mean over ranks)", columns, tuple(rows), note)


def _communication(windows: Sequence[WindowReport]) -> Table:
    """By kind: how often, how long, how much of it exposed, how many numbers a rank gives."""
    rows = []
    for window in windows:
        count = len(window.ranks)
        for kind in dict.fromkeys(t.kind for r in window.ranks for t in r.traffic):
            mine = [t for r in window.ranks for t in r.traffic if t.kind == kind]
            elements = [t.elements for t in mine if t.elements is not None]
            sums = (sum(getattr(t, name) for t in mine) for name in ("calls", "total_ms", "exposed_ms"))
            gave = f"{sum(elements) / count:,.0f}" if len(elements) == len(mine) else "-"
            rows.append((short_name(window.name), kind, *(_number(value / count) for value in sums), gave))
    columns = ("window", "kind", "calls", "ms", "exposed ms", "numbers given")
    title = "Communication per step (mean over ranks)"
    return Table(title, columns, tuple(rows), "" if rows else "There is none.", names=2)


def _ranks(windows: Sequence[WindowReport]) -> Table:
    """A line for each window and rank, with the ranks that it waits for."""
    rows = []
    for window in windows:
        for r in window.ranks:
            waits = (window.waits_ms or {}).get(r.rank, {})
            most = sorted(waits, key=lambda other: -waits[other])[:3]
            rows.append(
                (
                    short_name(window.name),
                    str(r.rank),
                    _number(r.step_ms),
                    *(_part(value, r.step_ms) for value in (r.computing_ms, r.exposed_ms, r.idle_ms)),
                    "-" if window.waits_ms is None else _number(sum(waits.values())),
                    ", ".join(f"{other}: {_number(waits[other])}" for other in most) or "-",
                )
            )
    columns = ("window", "rank", "step", "computing", "exposed", "idle", "waits", "for rank")
    note = "waits: what collectives take longer on this rank than on the one that comes to them last"
    return Table("Ranks, ms per step", columns, tuple(rows), note, names=2)


def _mean(window: WindowReport, value: Callable[[RankReport], float]) -> float:
    return fmean(map(value, window.ranks))


def _ranges(windows: Sequence[WindowReport], time: str) -> list[Row]:
    """A row for each range, of its `host_ms` or `device_ms`."""

    def mean(window: WindowReport, path: Path) -> float | None:
        times = [getattr(t, time) or 0.0 for r in window.ranks for t in r.ranges if t.path == path]
        return sum(times) / len(window.ranks) if times else None

    paths = range_paths(windows)
    return [_row("  " * (len(path) - 1) + path[-1], [mean(w, path) for w in windows], windows) for path in paths]


def _row(name: str, values: Sequence[float | None], of: Sequence[WindowReport] | None = None) -> Row:
    """A value for each window, with its share of the window's step if asked for, and the later ones over the first."""
    cells = [name]
    for i, value in enumerate(values):
        step = 0.0 if of is None else _mean(of[i], lambda r: r.step_ms)
        cells.append("-" if value is None else _part(value, step) if step else _number(value))
    first = values[0]
    cells += [f"{value / first:.2f}" if value is not None and first else "-" for value in values[1:]]
    return tuple(cells)


def _part(value: float, whole: float) -> str:
    return f"{_number(value)} {value / whole if whole else 0.0:4.0%}"


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}" if value else "0"


def _escaped(cell: str) -> str:
    """Indentation that Markdown keeps, and no bar that it would take for its own."""
    inner = cell.lstrip(" ")
    return "\u00a0" * (len(cell) - len(inner)) + inner.replace("|", "\\|")
