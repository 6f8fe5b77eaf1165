"""Two processes read a file, and one that cannot be read; prints what each has, and how often it read the first."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets

from aflora_dist import AFLoRAError
from aflora_dist.processes import launched_accelerator
from aflora_dist.tasks.reading import read_table, table

folder = Path(sys.argv[1])
datasets.config.HF_DATASETS_CACHE = folder / "cache"
accelerator = launched_accelerator()
calls = []
reading = table.read_rows
table.read_rows = lambda *args: calls.append(args) or reading(*args)
found = read_table(str(folder / "file.csv"), ["text"]).rows["text"][:]
read = len(calls)
try:
    read_table(str(folder / "file.tsv"), ["text"])
except AFLoRAError as error:
    said = str(error)
print(f"rank {accelerator.process_index} read {read}, has {found}, then {said}\n", end="", flush=True)
accelerator.end_training()
