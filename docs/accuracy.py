"""docs/accuracy.md, made from docs/results: run `python docs/accuracy.py`, which a test holds to what is committed.

    python docs/accuracy.py [--take FOLDER]

docs/results/page.md is the text; what stands there in {{...}} is worked out from the runs' results beside it:
{{table | STUDY | TASK}}, {{picture | STUDY | TASK}}, {{difference | STUDY | TASK | METHOD | OTHER}}, {{mean}},
{{trained}} of STUDY | TASK | METHOD, {{seconds | STUDY | TASK | METHOD | OTHER}}, and
{{count | TASK | STUDY METHOD OTHER | STUDY METHOD OTHER ...}}: how many of these comparisons speak for METHOD, and how
many against it; {{order | STUDY | TASK | METHOD}}: when A and B
froze, and how alike the orders of different seeds are; {{heat_map | STUDY | TASK | METHOD}} is Fig. 5. With --take,
results of another folder are put there before.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shutil
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

from aflora_dist.options import Config, DataConfig
from aflora_dist.study.cells import Cell, Compared, cells, compared
from aflora_dist.study.description import read_study, shipped
from aflora_dist.study.grid import Grid
from aflora_dist.study.pictures import dots, mean_freeze_map
from aflora_dist.study.results import Results, name_by, settings_of
from aflora_dist.study.tables import at_other_times, markdown

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
NONE = "not measured yet"
# Runs are named by the content of their files, and the word problems are not here: for the page a file stands for each.
PROBLEMS = DataConfig(task="sft", train_file=str(RESULTS / "page.md"), validation_file=str(DOCS / "accuracy.py"))


def committed() -> Results:
    """The results; of tasks whose data are not here, by the names of the runs that the page asks for."""
    results = Results(RESULTS)
    stand_in = settings_of(Config(data=PROBLEMS))
    for record in [*results.records.values()]:
        settings = {key: value for key, value in record["settings"].items() if key != "data.path"}
        settings |= {key: digest for key, digest in stand_in.items() if key in settings and key.endswith("_file")}
        if settings != record["settings"]:
            method = settings.get("method.name", "aflora")
            results.records[name_by(settings["data.task"], method, settings, record["seed"])] = record
    return results


@cache
def measured(study: str, task: str) -> tuple[Grid, Results, list[Cell], list[Compared]]:
    """A shipped study's small setting on a task, with those methods of which there are results."""
    results = committed()
    whole = read_study(shipped()[study], small=True)
    files = {f"data.{name}": getattr(PROBLEMS, name) for name in ("train_file", "validation_file")}
    more = files if task == "problems" else {}
    found = cells(Grid(whole.restricted([task], [], []), more), results.records)
    there = [cell.method for cell in found if cell.values or cell.failed]
    grid = Grid(whole.restricted([task], there, []), more)
    found = cells(grid, results.records) if there else []
    return grid, results, found, compared(grid, found) if there else []


def cell_of(study: str, task: str, method: str) -> Cell | None:
    return next((cell for cell in measured(study, task)[2] if cell.method == method), None)


def table(study: str, task: str) -> str:
    grid, results, found, _ = measured(study, task)
    return markdown(grid, results.records).rstrip() if found else f"({study}: {NONE})"


def difference(study: str, task: str, method: str, other: str) -> str:
    pairs = measured(study, task)[3]
    one = next((pair for pair in pairs if (pair.method, pair.other) == (method, other)), None)
    if one is None or one.difference.low is None or one.difference.high is None:
        return NONE
    d = one.difference
    after = "" if d.corrected is None else f"; p {d.corrected:.2f} after correction"
    return f"{d.mean:+.2f} points (95% interval {d.low:+.2f} to {d.high:+.2f}, {d.seeds} seeds{after}): {one.said}"


def count(task: str, *comparisons: str) -> str:
    found = []
    for comparison in comparisons:
        study, method, other = comparison.split()
        found += [pair for pair in measured(study, task)[3] if (pair.method, pair.other) == (method, other)]
    return counted(found)


def counted(pairs: list[Compared]) -> str:
    """In how many of them the method is better, and worse, by the verdicts of their tables; the same runs once."""
    names = {f"{pair.method} - {pair.other}" for pair in pairs}
    pairs = [pair for pair in pairs if not pair.lost and pair.same not in {pair.other, *names}]
    if not pairs:
        return NONE
    seen = [pair for pair in pairs if pair.seen]
    better = [pair.method for pair in seen if pair.better]
    worse = [pair.method for pair in seen if not pair.better]
    told = [
        f"{what} in {len(methods)} of {len(pairs)}" + (f" ({', '.join(methods)})" if methods else "")
        for what, methods in (("better", better), ("worse", worse))
    ]
    return f"{' and '.join(told)} comparisons" + ("" if len(seen) == len(pairs) else ", no difference seen in the rest")


def mean(study: str, task: str, method: str) -> str:
    cell = cell_of(study, task, method)
    return NONE if cell is None or cell.mean is None else f"{cell.mean:.2f}"


def trained(study: str, task: str, method: str) -> str:
    cell = cell_of(study, task, method)
    return NONE if cell is None or cell.trained is None else f"{cell.trained:,.0f}"


def seconds(study: str, task: str, method: str, other: str) -> str:
    """What a training takes in the place of another one, and whether that may be compared."""
    both = [cell for name in (method, other) if (cell := cell_of(study, task, name)) and cell.seconds is not None]
    if len(both) < 2:
        return NONE
    told = " (not all at the same time, so this does not compare)" if at_other_times(both) else ""
    return f"{both[0].seconds:.1f} s instead of {both[1].seconds:.1f} s{told}"


def order(study: str, task: str, method: str) -> str:
    """After how many updates A and B froze on average; Spearman's correlation of two seeds' orders, on average."""
    from scipy.stats import spearmanr

    if cell_of(study, task, method) is None:
        return NONE
    grid, results, _, _ = measured(study, task)
    runs = grid.plan(results.records).reported[task, method].values()
    froze = [results.records[run.name].get("frozen", {}) for run in runs if run.name in results.records]
    names = sorted(set.intersection(*map(set, froze)))
    if not names:
        return "no matrix froze with each seed" if any(froze) else "nothing froze"
    # The first update is step 0: what froze after it froze after one update.
    a, b = (
        1 + statistics.fmean(of[name] for of in froze for name in names if name.endswith(f".{one}")) for one in "AB"
    )
    pairs = itertools.combinations([[of[name] for name in names] for of in froze], 2)
    alike = statistics.fmean(spearmanr(*pair).statistic for pair in pairs) if len(froze) > 1 else math.nan
    return f"B after {b:.0f} updates on average, A after {a:.0f}; the orders of two seeds correlate with {alike:.2f}"


def picture(study: str, task: str) -> str:
    """Of the differences, where there is more than one seed; `main` draws it."""
    there = any(pair.difference.low is not None for pair in measured(study, task)[3])
    return f"![{study} on {task}: differences with their intervals](images/{study}_{task}.png)" if there else ""


def heat_map(study: str, task: str, method: str) -> str:
    """Fig. 5, the mean over seeds; `main` draws it."""
    grid, results, _, _ = measured(study, task)
    there = mean_freeze_map(grid, results.records, task, method) is not None
    where = f"images/{study}_{task}.png"
    return f"![{method} of {study} on {task}: when each matrix froze]({where})" if there else f"({study}: {NONE})"


MACROS: dict[str, Callable[..., str]] = {
    each.__name__: each for each in (table, picture, heat_map, difference, count, mean, trained, seconds, order)
}


def page() -> str:
    """The whole page."""

    def worked_out(found: re.Match[str]) -> str:
        name, *arguments = (part.strip() for part in found[1].split("|"))
        return MACROS[name](*arguments)

    return re.sub(r"\{\{(.+?)\}\}", worked_out, (RESULTS / "page.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make docs/accuracy.md of the results in docs/results.")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="put the results there into docs/results before")
    parser.add_argument("--out", type=Path, default=DOCS / "accuracy.md", help="the page")
    args = parser.parse_args(argv)
    if args.take is not None and not args.take.is_dir():
        parser.error(f"--take {args.take} is no folder")
    if args.take is not None:
        for file in sorted(args.take.glob("*-seed*.json")):
            shutil.copyfile(file, RESULTS / file.name)
    (args.out.parent / "images").mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(), encoding="utf-8")
    for study, task in re.findall(r"!\[(\w+) on (\w+): differences", args.out.read_text(encoding="utf-8")):
        dots(measured(study, task)[3]).savefig(args.out.parent / "images" / f"{study}_{task}.png", dpi=130)
    for method, study, task in re.findall(r"!\[(\w+) of (\w+) on (\w+): when", args.out.read_text(encoding="utf-8")):
        grid, results, _, _ = measured(study, task)
        if (figure := mean_freeze_map(grid, results.records, task, method)) is not None:
            figure.savefig(args.out.parent / "images" / f"{study}_{task}.png", dpi=130)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
