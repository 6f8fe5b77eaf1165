"""A study's tables: its cells and differences as Markdown, LaTeX and CSV, with what one has to know to read them."""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from ..store.best import LOWER_IS_BETTER
from .cells import WAY, Cell, Compared, cells, compared
from .choice import Records
from .grid import Grid

_BREAK = timedelta(hours=1)  # in which nothing ran: then another time begins
_HEAD = ["task", "method", "seeds", "metric", "last epoch", "best epoch", "trained", "seconds", "chosen", "paper"]
_HEAD_DIFFERENCES = ["task", "compared", "seeds", "difference", "95% interval", "p, corrected", ""]
_IN_LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
    | {special: rf"\{special}" for special in "&%$#_{}"}
)


def digits_of(metric: str) -> int:
    """Behind the point: losses are no points, and small."""
    return 4 if metric in LOWER_IS_BETTER else 2


def measured_in(metrics: Collection[str]) -> str:
    """What numbers of these metrics are in."""
    points = ["points"] * any(metric not in LOWER_IS_BETTER for metric in metrics)
    return " and ".join([*points, *(f"units of {metric}" for metric in LOWER_IS_BETTER if metric in metrics)])


def _numbers(found: Sequence[Cell]) -> list[list[str]]:
    rows = []
    for cell in found:
        broken = [f"{n} {what}" for n, what in ((cell.failed, "diverged"), (cell.missing, "to do")) if n]
        broken += ["broken, see below"] * bool(cell.broken)
        digits = digits_of(cell.metric)
        spread = f" ± {cell.deviation:.{digits}f}" if cell.deviation is not None else ""
        rows.append(
            [
                cell.task,
                cell.method,
                f"{len(cell.values)}" + (f" ({', '.join(broken)})" if broken else "" if cell.values else " (quoted)"),
                cell.metric.replace("_", " "),
                "-" if cell.mean is None else f"{cell.mean:.{digits}f}{spread}",
                "-" if cell.best_mean is None else f"{cell.best_mean:.{digits}f}",
                "-" if cell.trained is None else f"{cell.trained:,.0f}",
                "-" if cell.seconds is None else f"{cell.seconds:,.1f}",
                cell.chosen or "-",
                "-" if cell.paper is None else f"{cell.paper:.{digits}f}",
            ]
        )
    return rows


def _differences(found: Sequence[Compared]) -> list[list[str]]:
    rows = []
    for one in found:
        d, digits = one.difference, digits_of(one.metric)
        between = "-" if d.low is None or d.high is None else f"{d.low:+.{digits}f} to {d.high:+.{digits}f}"
        corrected = "-" if d.corrected is None else f"{d.corrected:.3f}"
        names = f"{one.method} - {one.other}"
        rows.append([one.task, names, str(d.seeds), f"{d.mean:+.{digits}f}", between, corrected, one.said])
    return rows


def caption(grid: Grid, found: Sequence[Cell], pairs: Sequence[Compared]) -> list[str]:
    """What one has to know to read the tables."""
    study = grid.study
    unit = measured_in({cell.metric for cell in found})
    lines = [
        study.title,
        f"Mean and standard deviation over seeds, in {unit}; the best epoch is chosen by the data that are reported, "
        "and is too good for that. Trained: parameters, on average over the updates, without the head. Seconds: of "
        "training (on CPUs those of the processor, of the main rank).",
    ]
    if study.sweep is not None and any(cell.chosen for cell in found):
        seeds = ", ".join(map(str, study.sweep.seeds))
        held = study.sweep.options["data.hold_out"]
        lines.append(f"Chosen by runs with seeds {seeds} on {held} training examples that were held out of them.")
    lines += [f"Broken: {cell.broken}" for cell in found if cell.broken]
    if pairs:
        tried = sum(pair.difference.corrected is not None and not pair.same for pair in pairs)
        lines.append(
            f"Differences are paired by seed; p is Student's t, corrected by Holm's method for {tried} "
            f"comparison{'s' * (tried != 1)}; a difference is called one where it is below 0.05."
        )
    if any(pair.lost for pair in pairs):
        lines.append("Where runs diverged, the seeds that are left are those that went well: no verdict.")
    lines += _same_runs(found)
    lines += [*_not_alike(found), *at_other_times(found)]
    if grid.told:
        lines.append(f"All runs with {', '.join(f'{name} {value}' for name, value in grid.told.items())}.")
    if study.differs:
        lines.append(f"Setting: {study.differs}")
    return [" ".join(line.split()) for line in lines]


def _same_runs(found: Sequence[Cell]) -> list[str]:
    """Which methods came to the same runs as others: a sentence for each."""
    first: dict[tuple[str, ...], Cell] = {}
    said = []
    for cell in found:
        runs = (cell.task, *cell.runs.values())
        if cell.runs and (other := first.setdefault(runs, cell)) is not cell:
            said.append(f"{_where(cell, found)} came to the very runs of {other.method}, which are not compared twice.")
    return said


def _not_alike(found: Sequence[Cell]) -> list[str]:
    """Which cells' runs were launched in another way than others': a sentence, if there are such."""
    differ = [key for key in WAY if len({way[key] for cell in found for way in cell.ways}) > 1]
    by_way: defaultdict[str, list[str]] = defaultdict(list)
    for cell in found:
        ways = sorted({", ".join(f"{key} {way[key]}" for key in differ) for way in cell.ways})
        by_way[" and ".join(ways)].append(_where(cell, found))
    said = [f"{', '.join(names)} with {ways}" for ways, names in by_way.items() if ways]
    told = f"Not all were launched alike ({'; '.join(said)}): what differs may come of that, and not of the method."
    return [told] if differ else []


def _where(cell: Cell, found: Sequence[Cell]) -> str:
    return cell.method if len({one.task for one in found}) == 1 else f"{cell.method} on {cell.task}"


def at_other_times(found: Sequence[Cell]) -> list[str]:
    """Which cells' seconds do not compare: a sentence, if there are such."""
    starts: list[datetime] = []
    until = datetime.min.replace(tzinfo=UTC)
    for begin, end in sorted(span for cell in found for span in cell.spans):
        if begin - until > _BREAK:
            starts.append(begin)
        until = max(until, end)
    by_times: defaultdict[tuple[datetime, ...], list[str]] = defaultdict(list)
    for cell in found:
        times = tuple(sorted({starts[bisect_right(starts, begin) - 1] for begin, _ in cell.spans}))
        if times:
            by_times[times].append(_where(cell, found))
    if len(by_times) < 2:
        return []
    said = [
        f"{', '.join(names)} from {' and '.join(f'{time:%d %B %Y %H:%M}' for time in times)} on"
        for times, names in sorted(by_times.items())
    ]
    return [
        f"Not all ran at the same time ({'; '.join(said)}; UTC): seconds of different times do not compare, nor what "
        "was made as short by them, for a machine that has other work to do takes longer."
    ]


def markdown(grid: Grid, records: Records) -> str:
    """Both tables, with what one has to know."""
    found = cells(grid, records)
    pairs = compared(grid, found)
    title, *notes = caption(grid, found, pairs)
    parts = [f"**{title}**", _markdown_table(*_shown(found))]
    if pairs:
        parts.append(_markdown_table(_HEAD_DIFFERENCES, _differences(pairs)))
    return "\n\n".join([*parts, " ".join(notes)]) + "\n"


def _shown(found: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, without columns in which nothing stands."""
    rows = _numbers(found)
    there = [i for i in range(len(_HEAD)) if any(row[i] != "-" for row in rows)]
    return [_HEAD[i] for i in there], [[row[i] for i in there] for row in rows]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    cells_of = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells_of)])


def latex(grid: Grid, records: Records) -> str:
    """Both tables, for a paper that uses booktabs."""
    found = cells(grid, records)
    pairs = compared(grid, found)
    parts = [_latex_table(*_shown(found))]
    if pairs:
        parts.append(_latex_table(_HEAD_DIFFERENCES, _differences(pairs)))
    notes = "".join(f"% {line}\n" for line in caption(grid, found, pairs))
    return notes + "\n\n".join(parts) + "\n"


def _latex_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A row that begins with [ or * would be taken for an argument of the rule, or the end of the row, before it.
    lines = ["{}" + " & ".join(cell.translate(_IN_LATEX) for cell in row) + r" \\" for row in (head, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(head)}}}", *body, r"\end{tabular}"])


def as_csv(grid: Grid, records: Records) -> dict[str, str]:
    """All numbers, unrounded: "" for what the runs came to, a line per seed; "differences" for those."""
    found = cells(grid, records)
    runs = [
        {
            "task": c.task,
            "method": c.method,
            "metric": c.metric,
            "seed": seed,
            "last_epoch": value,
            "best_epoch": c.best[seed],
        }
        | {"trained": c.trained_by.get(seed), "seconds": c.seconds_by[seed], "chosen": c.chosen, "paper": c.paper}
        for c in found
        for seed, value in c.values.items()
    ]
    pairs = [
        {"task": one.task, "method": one.method, "other": one.other, **asdict(one.difference), "said": one.said}
        for one in compared(grid, found)
    ]
    texts = {}
    for name, rows in (("", runs), ("differences", pairs)):
        text = io.StringIO()
        writer = csv.DictWriter(text, [*rows[0]] if rows else ["task"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        texts[name] = text.getvalue()
    return texts
