"""How much memory it takes to read a file of examples, which is kept in pieces and then mapped: on a file made up here.

    python -m profiling.reading --megabytes 300 --kind jsonl

Prints what the process holds of its own (RssAnon: without files that are mapped) at most, above what it held before.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path

import datasets

from aflora_dist.tasks.reading import read_table

_TEXT = "Ada has three apples and buys four more. How many apples has she now? " * 6


def write(path: Path, megabytes: int) -> None:
    """Texts of some 400 characters; a .json is one list in one line."""
    with path.open("w", encoding="utf-8") as file:
        file.write({".csv": "text\n", ".json": "["}.get(path.suffix, ""))
        for row in range(megabytes * 10**6 // (len(_TEXT) + 20)):
            text = f"{row} {_TEXT}"
            line = text if path.suffix == ".csv" else json.dumps({"text": text})
            file.write(line + "\n" if path.suffix != ".json" else f"{', ' if row else ''}{line}")
        file.write("]" if path.suffix == ".json" else "")


def held() -> int:
    """Bytes of this process's own memory (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m profiling.reading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--kind", choices=("csv", "json", "jsonl"), default="jsonl")
    args = parser.parse_args(arguments)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, held())
            time.sleep(0.02)

    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        path = Path(folder) / f"file.{args.kind}"
        write(path, args.megabytes)
        before = held()
        watcher = threading.Thread(target=watch)
        watcher.start()
        rows = len(read_table(str(path), ["text"]).rows)
        done.set()
        watcher.join()
        size = path.stat().st_size
    print(f"{rows:,} rows of a {args.kind} of {size / 1e6:.0f} MB: at most {(most - before) / 1e6:.0f} MB more")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
