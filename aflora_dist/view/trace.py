"""The command `aflora trace`: a run's profiler windows side by side, as tables and as numbers."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ..errors import writing
from ..traces import Table, read_run, tables
from .terminal import console as create_console


def print_table(table: Table, console: Console) -> None:
    console.print(Text(table.title, style="bold"))
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for i, column in enumerate(table.columns):
        name = i < table.names
        shown.add_column(column.replace("/", "/\n"), justify="left" if name else "right", no_wrap=not name)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    if table.note:
        console.print(Text(table.note, style="dim"))
    console.print()


def main(arguments: list[str]) -> int:
    """`aflora trace`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="aflora trace", description="Compare the profiler's windows of a run: ranges, communication, idle, ranks."
    )
    parser.add_argument("run", type=Path, help="the directory (run.dir) of a run with --profile")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="read the traces of these ranks only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers")
    args = parser.parse_args(arguments)
    console = create_console()
    windows, problems = read_run(args.run, args.ranks)
    for table in tables(windows):
        print_table(table, console)
    for problem in problems:
        console.print(Text(f"note: {problem}"), soft_wrap=True)
    if args.json is not None:
        numbers = {"run": str(args.run), "windows": [asdict(window) for window in windows], "notes": problems}
        with writing("The numbers", args.json):
            args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {args.json}", soft_wrap=True)
    return 0
