"""`aflora study FILE.yaml` and `aflora reproduce NAME`: do a study's runs, and write its tables."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import AFLoRAError, writing
from ..extras import require
from ..notices import outlive_output
from ..training.command_line import split_line
from .cells import cells, compared
from .description import read_study, shipped
from .grid import Grid
from .refusals import OURS
from .results import Results
from .tables import as_csv, latex, markdown
from .work import Work, outlook


def write_tables(grid: Grid, results: Results, folder: Path) -> list[Path]:
    """NAME.md, .tex, .csv and the pictures; NAME is the study's, with which part of it this is.

    Raises:
        AFLoRAError: The folder cannot be written.
    """
    from .pictures import against_seconds, dots, mean_freeze_map  # matplotlib takes a second

    name, records = grid.study.label, results.records
    found = cells(grid, records)
    pairs = compared(grid, found)
    texts = {f"{name}.md": markdown(grid, records), f"{name}.tex": latex(grid, records)}
    texts |= {f"{name}{'_' * bool(kind)}{kind}.csv": text for kind, text in as_csv(grid, records).items()}
    drawn: dict[str, Any] = {
        f"{name}_seconds.png": against_seconds(found),
        f"{name}_differences.png": dots(pairs) if pairs else None,
    }
    if "freeze_map" in grid.study.pictures:
        for task in grid.study.tasks:
            for method in grid.study.reported:
                file = f"{name}_froze_{task}__{method}.png".replace("/", "-")  # names of the study's
                drawn[file] = mean_freeze_map(grid, records, task, method)
    with writing("The tables", folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        for file, figure in drawn.items():
            if figure is not None:
                figure.savefig(folder / file, dpi=130)
            else:  # of an earlier table, beside which it would be taken for this one's
                (folder / file).unlink(missing_ok=True)
    return [folder / file for file in (*texts, *(file for file, figure in drawn.items() if figure is not None))]


def main(command: str, arguments: list[str]) -> int:
    """`aflora study` and `aflora reproduce`; returns the exit status: 3 where runs are left to do."""
    parser = _parser(command)
    args, more = parser.parse_known_args(arguments)
    try:
        require("train", f"aflora {command}")
        if command == "reproduce" and args.study is None and arguments:
            raise AFLoRAError(f"Which study? Its name comes first: aflora reproduce NAME {arguments[0]} ...")
        if command == "reproduce" and args.study is None:
            print(*(f"{name:10} {read_study(path).title}" for name, path in shipped().items()), sep="\n")
            return 0
        study = read_study(_file(command, args.study), args.small)
        grid = Grid(study.restricted(args.tasks, args.methods, args.seeds), _options(more))
        results = Results(args.results or args.out / "results")
        print(f"{study.name}: {outlook(grid.plan(results.records), results)}", flush=True)
        if args.dry_run:
            return 0
        outlive_output()
        done = args.tables_only or Work(grid, results, args.out / "runs", args.launch, args.at_once).run()
        for path in write_tables(grid, results, args.out / "tables"):
            print(f"wrote {path}")
        for cell in cells(grid, results.records):
            if cell.broken:
                print(f"aflora: broken: {cell.broken}", file=sys.stderr)
        return 0 if done else 3
    except AFLoRAError as error:
        print(f"aflora: error: {error}", file=sys.stderr)
        return 2


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"aflora {command}",
        description="Do a study's runs, and write its tables.",
        epilog="All else is handed on to each run of `aflora train`, as in --model.name roberta-base.",
        allow_abbrev=False,
    )
    if command == "study":
        parser.add_argument("study", type=Path, metavar="FILE", help="YAML: docs/study.md says what is in it")
    else:
        names = ", ".join(shipped())
        parser.add_argument("study", nargs="?", metavar="NAME", help=f"{names}; none: what each of them is")
    parser.add_argument("--small", action="store_true", help="what the study's section `small` says: for two cores")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), metavar="FOLDER", help="runs, results, tables")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of OUT/results")
    for name, kind in (("tasks", str), ("methods", str), ("seeds", int)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=[], metavar="NAME", help="these alone")
    parser.add_argument(
        "--at_once", type=_at_least_one, default=1, metavar="N", help="runs side by side, as memory allows"
    )
    parser.add_argument("--launch", type=shlex.split, metavar="OPTIONS", help="start runs by accelerate launch OPTIONS")
    parser.add_argument("--dry_run", action="store_true", help="how many runs, and how long; nothing is done")
    parser.add_argument("--tables_only", action="store_true", help="of the results that there are")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, not {text!r}")
    return int(text)


def _file(command: str, named: Any) -> Path:
    if command == "study":
        return Path(named)
    if named not in shipped():
        raise AFLoRAError(
            f"There is no study {named!r}: there are {', '.join(shipped())}. Yours: aflora study FILE.yaml."
        )
    return shipped()[named]


def _options(words: list[str]) -> dict[str, str]:
    """Options for every run, as they stand on the command line."""
    files, said = split_line(["", *words])
    if odd := next((name for name in said if name in OURS), None):
        raise AFLoRAError(f"--{odd} is the study's to say: see --out and --seeds.")
    if "preset" in said or files[1:]:
        raise AFLoRAError(
            "A preset is what a task is, and so is a file of options: choose with --tasks, or write a study whose "
            "tasks name yours."
        )
    return said
