"""`aflora collect FOLDER`: the runs of a job array as a table, mean and deviation over seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ..errors import AFLoRAError, writing

_OF_ONE_RUN = ("run", "profile")  # sections that say nothing about the setting


def groups(folder: Path) -> list[dict[str, Any]]:
    """Finished runs under `folder`, one entry per setting (everything but the seed and the directory).

    Each entry has task, metric (the task's first), seeds, values, trainable (average), seconds, unfinished.

    Raises:
        AFLoRAError: There is no run under the folder.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("config.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "train" not in config:
            continue
        setting = {key: value for key, value in config.items() if key not in _OF_ONE_RUN}
        seed = setting["train"].pop("seed")
        entry = found.setdefault(
            json.dumps(setting, sort_keys=True),
            {
                "task": config["data"]["task"],
                "model": config["model"]["name"],
                "setting": setting,
                "runs": [],
                "unfinished": 0,
            },
        )
        result = path.parent / "result.json"
        if result.exists():
            entry["runs"].append({"seed": seed, **json.loads(result.read_text(encoding="utf-8"))})
        else:
            entry["unfinished"] += 1
    if not found:
        raise AFLoRAError(f"There is no run under {folder}.")
    return list(found.values())


def rows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per setting and metric; the deviation is the sample's (n - 1), absent for one run."""
    table = []
    for entry in entries:
        runs = entry["runs"]
        for metric in runs[0]["metrics"] if runs else ["-"]:
            values = [run["metrics"][metric] for run in runs]
            table.append(
                {
                    "task": entry["task"],
                    "model": entry["model"],
                    "differs in": _differences(entry, entries),
                    "metric": metric,
                    "seeds": len(values),
                    "unfinished": entry["unfinished"],
                    "mean": statistics.fmean(values) if values else None,
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "trainable": statistics.fmean(run["avg_trainable_params"] for run in runs) if runs else None,
                    "seconds": statistics.fmean(run["train_seconds"] for run in runs) if runs else None,
                }
            )
    return table


def _differences(entry: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """What tells this setting from the others of the same task."""
    same = [other["setting"] for other in entries if other["task"] == entry["task"]]
    flat = {
        f"{section}.{key}": value
        for section, values in entry["setting"].items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return ", ".join(
        f"{name}={value}"
        for name, value in flat.items()
        if any(setting[name.split(".")[0]].get(name.split(".")[1]) != value for setting in same)
    )


def main(arguments: list[str]) -> int:
    """`aflora collect`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="aflora collect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="looked through with all its subfolders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    args = parser.parse_args(arguments)
    try:
        lines = rows(groups(args.folder))
        if args.json is not None:
            with writing("The table", args.json):
                args.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    except AFLoRAError as error:
        print(f"aflora: error: {error}", file=sys.stderr)
        return 2
    table = Table()
    for title in ("task", "model", "differs in", "metric", "seeds", "mean ± deviation", "trainable", "seconds"):
        table.add_column(title, justify="left" if title in ("task", "model", "differs in", "metric") else "right")
    for line in lines:
        deviation = "" if line["deviation"] is None else f" ± {line['deviation']:.4f}"
        table.add_row(
            line["task"],
            line["model"],
            line["differs in"],
            line["metric"],
            f"{line['seeds']}" + (f" (+{line['unfinished']} unfinished)" if line["unfinished"] else ""),
            "-" if line["mean"] is None else f"{line['mean']:.4f}{deviation}",
            "-" if line["trainable"] is None else f"{line['trainable']:,.0f}",
            "-" if line["seconds"] is None else f"{line['seconds']:.1f}",
        )
    Console().print(table)
    return 0
