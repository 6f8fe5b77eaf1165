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
from .kept import cache_folder, found_or_made, key, publish

_PROBED = 64  # texts by whose tokens a tokenizer is known that changes without its files: its code, its library
_PART = 10_000  # examples in a file
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
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": examples["label"]}

    return made_once(dataset, tokenizer, tokenize, [max_length], name)


def made_once(
    dataset: datasets.Dataset,
    tokenizer: Any,
    tokenize: Callable[[Columns], Columns],
    settings: list[Any],
    name: str,
) -> datasets.Dataset:
    """What `tokenize` makes of the examples, batch by batch: as many rows, "labels" among the columns. A collective.

    Args:
        settings: What it depends on besides the examples and the tokenizer.
        name: What the progress bar calls it.

    Raises:
        AFLoRAError: On every rank, where it failed on one.
    """
    watched = PartialState().is_main_process and sys.stderr.isatty()
    bar = tqdm(total=len(dataset), desc=f"tokenizing {name}", unit=" examples", delay=_PATIENCE, disable=not watched)
    datasets.disable_progress_bars()  # they come at once, in every process and in files

    def found_or_tokenized() -> datasets.Dataset:
        probed = sorted(tokenize(dataset[:_PROBED]).items())
        stem = key(_content(dataset, tokenizer), dataset.column_names, probed, settings)
        starts = range(0, max(len(dataset), 1), _PART)
        parts = {}
        for number, start in enumerate(starts, start=1):
            file = f"{stem}.arrow" if len(starts) == 1 else f"{stem}-{number}-of-{len(starts)}.arrow"
            parts[cache_folder() / file] = range(start, min(start + _PART, len(dataset)))

        def make(missing: list[Path], folder: Path) -> None:
            bar.update(sum(len(rows) for file, rows in parts.items() if file not in missing))

            def make_one(file: Path, told: Callable[[int], Any]) -> None:
                part = dataset if len(parts) == 1 else dataset.select(parts[file])
                _mapped(part, tokenize, told, new_fingerprint=file.stem, cache_file_name=str(folder / file.name))
                publish(folder / file.name, file)

            if min(len(missing), _cores()) == 1:
                for file in missing:
                    make_one(file, bar.update)
                return
            for file in _made_beside(missing, lambda file: make_one(file, lambda rows: None)):
                bar.update(len(parts[file]))

        return found_or_made(
            f"tokens of {name}",
            {file: len(rows) for file, rows in parts.items()},
            make,
            lambda: _mapped(dataset, tokenize, bar.update, new_fingerprint=stem, keep_in_memory=True),
        )

    with bar, _all_cores():
        return first_on_node(found_or_tokenized)


def _mapped(
    part: datasets.Dataset, tokenize: Callable[[Columns], Columns], told: Callable[[int], Any], **options: Any
) -> datasets.Dataset:
    """The tokens of a part; `told` is called with the number of examples of each batch."""

    def tokenize_and_tell(examples: Columns) -> Columns:
        tokens = tokenize(examples)
        told(len(tokens["labels"]))
        return tokens

    return part.map(
        tokenize_and_tell,
        batched=True,
        remove_columns=part.column_names,
        load_from_cache_file=False,
        **options,
    )


def _content(dataset: datasets.Dataset, tokenizer: Any) -> str:
    """A hash of the examples and of the tokenizer's own files."""
    content = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content.update(path.name.encode() + path.read_bytes())
    for examples in dataset.iter(batch_size=10_000):
        content.update(json.dumps(examples).encode())
    return content.hexdigest()


_make: Callable[[Path], None]  # in a forked process


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _made_beside(files: Sequence[Path], make: Callable[[Path], None]) -> Iterator[Path]:
    """Have files made by as many forked processes as there are cores, and give each that is done.

    Raises:
        AFLoRAError: A process was ended from outside.
    """
    forked = multiprocessing.get_context("fork")  # tokenizer and data need not be pickled
    with ProcessPoolExecutor(min(len(files), _cores()), forked, initializer=_begin, initargs=(make,)) as pool:
        begun = {pool.submit(_make_here, file): file for file in files}
        try:
            for made in as_completed(begun):
                made.result()
                yield begun[made]
        except BrokenProcessPool:
            raise AFLoRAError(
                "A process that tokenised was ended from outside, by lack of memory, perhaps. What is done is kept: "
                "the same command goes on from there."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(make: Callable[[Path], None]) -> None:
    """In a forked process: the tokenizer has none of the threads that it had, and every core has a process."""
    global _make
    _make = make
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _make_here(file: Path) -> None:
    _make(file)


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
