"""Texts become tokens once on each node, see `kept`.

Large data are cut into parts, made by several processes at a time: what is done when a run is ended is not done again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from accelerate.state import PartialState
from tqdm.auto import tqdm

from ..errors import AFLoRAError
from ..processes import first_on_node
from .kept import cache_folder, found_or_made, key, put_in_place

_PROBED = 64  # texts by whose tokens a tokenizer is known that changes without its files: its code, its library
_PART = 10_000  # examples in a file
_AT_ONCE = 4_000_000  # bytes of examples that are held as tokens at once, or one example
_PATIENCE = 3.0  # seconds before a progress bar is shown
Columns = dict[str, list[Any]]


def tokenized(dataset: datasets.Dataset, tokenizer: Any, max_length: int, name: str) -> datasets.Dataset:
    """The columns that the tokenizer makes of text (and text_pair), cut to max_length, and "labels". A collective.

    Args:
        name: What the progress bar calls it.

    Raises:
        AFLoRAError: On every rank, where it failed on one.
    """

    def tokenize(examples: Columns) -> Columns:
        texts = [examples[column] for column in ("text", "text_pair") if column in examples]
        tokens = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        # Where nothing is written, and the tokenizer adds nothing, a model needs a token to look at.
        empty = [place for place, ids in enumerate(tokens["input_ids"]) if not ids] if alone is not None else []
        for place in empty:
            for column in tokens:
                tokens[column][place] = [{"input_ids": alone, "attention_mask": 1}.get(column, 0)]
        return {**tokens, "labels": examples["label"]}

    bos, eos, unknown, pad = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad"))
    alone = next((token for token in (bos, eos, unknown) if token not in (None, pad)), pad)
    return made_once(dataset, tokenizer, tokenize, [max_length, alone], name)


def made_once(
    dataset: datasets.Dataset,
    tokenizer: Any,
    tokenize: Callable[[Columns], Columns],
    settings: list[Any],
    name: str,
    several_rows: bool = False,
) -> datasets.Dataset:
    """What `tokenize` makes of the examples, batch by batch, "labels" among the columns. A collective.

    Args:
        settings: What it depends on besides the examples and the tokenizer.
        name: What the progress bar calls it.
        several_rows: Whether an example may become several.

    Raises:
        AFLoRAError: On every rank, where it failed on one.
    """
    watched = PartialState().is_main_process and sys.stderr.isatty()
    bar = tqdm(total=len(dataset), desc=f"tokenizing {name}", unit=" examples", delay=_PATIENCE, disable=not watched)
    datasets.disable_progress_bars()  # they come at once, in every process and in files

    at_once = _rows_at_once(dataset)

    def mapped(part: datasets.Dataset, **options: Any) -> datasets.Dataset:
        options |= {"batched": True, "batch_size": min(1000, at_once), "writer_batch_size": min(1000, at_once)}
        options |= {"remove_columns": dataset.column_names, "load_from_cache_file": False}
        return part.map(tokenize, **options)

    def found_or_tokenized() -> datasets.Dataset:
        probed = sorted(tokenize(dataset[: min(_PROBED, at_once)]).items())
        stem = key(_content(dataset, tokenizer), dataset.column_names, probed, settings)
        starts = range(0, max(len(dataset), 1), _PART)
        parts = {}
        for number, start in enumerate(starts, start=1):
            file = f"{stem}.arrow" if len(starts) == 1 else f"{stem}-{number}-of-{len(starts)}.arrow"
            parts[cache_folder() / file] = range(start, min(start + _PART, len(dataset)))

        def make(missing: list[Path], folder: Path) -> None:
            def make_one(file: Path) -> Path:
                part = dataset if len(parts) == 1 else dataset.select(parts[file])
                mapped(part, new_fingerprint=file.stem, cache_file_name=str(folder / file.name))
                put_in_place(folder / file.name, file)
                return file

            bar.update(sum(len(rows) for file, rows in parts.items() if file not in missing))
            several = min(len(missing), _cores()) > 1
            for file in _by_processes(make_one, missing) if several else map(make_one, missing):
                bar.update(len(parts[file]))

        lengths = {file: None if several_rows else len(rows) for file, rows in parts.items()}
        return found_or_made(
            f"tokens of {name}", lengths, make, lambda: mapped(dataset, new_fingerprint=stem, keep_in_memory=True)
        )

    with bar, _all_cores():
        return first_on_node(found_or_tokenized)


def _content(dataset: datasets.Dataset, tokenizer: Any) -> str:
    """A hash of the examples and of the tokenizer's own files."""
    content = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content.update(path.name.encode() + path.read_bytes())
    for examples in dataset.iter(batch_size=min(10_000, _rows_at_once(dataset))):
        content.update(json.dumps(examples, default=str).encode())  # Decimal, dates
    return content.hexdigest()


def _rows_at_once(dataset: datasets.Dataset) -> int:
    """How many examples have about as many bytes; one at least."""
    return max(1, _AT_ONCE * len(dataset.data) // max(dataset.data.nbytes, 1))


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _by_processes(make: Callable[[Path], Path], files: Sequence[Path]) -> Iterator[Path]:
    """Have files made by as many forked processes as there are cores, and give each that is done."""
    forked = multiprocessing.get_context("fork")  # tokenizer and data need not be pickled
    with ProcessPoolExecutor(min(len(files), _cores()), forked, initializer=_begin, initargs=(make,)) as pool:
        try:
            for made in as_completed([pool.submit(_make_here, file) for file in files]):
                yield made.result()
        except BrokenProcessPool:
            raise AFLoRAError(
                "A process that tokenised was ended from outside, by lack of memory, perhaps. What is done is kept: "
                "the same command goes on from there."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_make: Callable[[Path], Path]  # in a forked process


def _begin(make: Callable[[Path], Path]) -> None:
    """In a forked process: the tokenizer has none of the threads that it had, and every core has a process."""
    global _make
    _make = make
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _make_here(file: Path) -> Path:
    return _make(file)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let a fast tokenizer use threads, unless told otherwise; and not afterwards, when processes may be forked."""
    variable = "TOKENIZERS_PARALLELISM"
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "true"
    try:
        yield
    finally:
        os.environ[variable] = "false"
