"""Texts become tokens once on each node, in files that all its ranks read; later runs find them there.

A file's name is made of what it depends on: the data, the tokenizer's own files, what it makes of the first texts,
where texts are cut, and the code that makes tokens. So nothing is ever overwritten, and the folder can be emptied at
any time. Large data are cut into parts, made by several processes at a time: what is done when a run is ended is not
done again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from accelerate.state import PartialState
from tqdm.auto import tqdm

from ..errors import AFLoRAError, one_line
from ..processes import first_on_node

_PROBED = 64  # texts by whose tokens a tokenizer is known that changes without its files: its code, its library
_PART = 10_000  # examples in a file
_PATIENCE = 3.0  # seconds before a progress bar is shown


def cache_folder() -> Path:
    """Where tokens are kept: beside what the library datasets keeps (HF_DATASETS_CACHE)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "aflora"


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

    def make(part: datasets.Dataset, key: str, told: Callable[[int], Any], **options: Any) -> datasets.Dataset:
        def tokenize_and_tell(examples: Columns) -> Columns:
            tokens = tokenize(examples)
            told(len(tokens["labels"]))
            return tokens

        return part.map(
            tokenize_and_tell,
            batched=True,
            remove_columns=dataset.column_names,
            new_fingerprint=key,
            load_from_cache_file=False,
            **options,
        )

    def found_or_made() -> datasets.Dataset:
        key = _key(dataset, tokenizer, tokenize(dataset[:_PROBED]), settings)
        starts = range(0, max(len(dataset), 1), _PART)
        parts = {_file(key, i, len(starts)): range(at, min(at + _PART, len(dataset))) for i, at in enumerate(starts)}

        def make_part(kept: Path, folder: str, told: Callable[[int], Any]) -> None:
            made = Path(folder) / kept.name
            part = dataset if len(parts) == 1 else dataset.select(parts[kept])
            make(part, kept.stem, told, cache_file_name=str(made))
            _publish(made, kept)

        def make_parts(missing: list[Path], folder: str) -> None:
            if min(len(missing), _cores()) == 1:
                for kept in missing:
                    make_part(kept, folder, bar.update)
                return
            for kept in _made_beside(missing, lambda kept: make_part(kept, folder, lambda rows: None)):
                bar.update(len(parts[kept]))

        try:
            missing = [kept for kept in parts if not kept.exists()]
            bar.update(sum(len(rows) for kept, rows in parts.items() if kept not in missing))
            if missing:
                cache_folder().mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix="making-", dir=cache_folder()) as folder:
                    make_parts(missing, folder)
            return _read(parts)
        except AFLoRAError:
            raise  # an example that cannot be tokenised
        except (OSError, ValueError) as error:  # read-only, full, or damaged: Arrow's errors are of both kinds
            if PartialState().is_local_main_process:
                reason = getattr(error, "strerror", None) or one_line(error)
                print(
                    f"The tokens of {name} are not kept: {cache_folder()}/{key} cannot be used ({reason}). Every "
                    f"process makes them for itself; HF_DATASETS_CACHE names another folder.",
                    file=sys.stderr,
                    flush=True,
                )
            return make(dataset, key, bar.update, keep_in_memory=True)

    datasets.disable_progress_bars()  # they come at once, in every process and in files
    with bar, _all_cores():
        return first_on_node(found_or_made)


def _key(dataset: datasets.Dataset, tokenizer: Any, probed: Columns, settings: list[Any]) -> str:
    """A name for these tokens: 40 hexadecimal digits."""
    content = hashlib.sha256(json.dumps([sorted(probed.items()), *settings, dataset.column_names, _code()]).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content.update(path.name.encode() + path.read_bytes())
    for examples in dataset.iter(batch_size=10_000):
        content.update(json.dumps(examples).encode())
    return content.hexdigest()[:40]


@cache
def _code() -> list[str]:
    """What stands for the code that makes tokens: of this package, and the releases of what it calls."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        content.update(path.read_bytes())
    return [content.hexdigest(), *(version(name) for name in ("transformers", "tokenizers", "datasets"))]


def _publish(made: Path, kept: Path) -> None:
    try:
        os.link(made, kept)  # unlike a rename, it takes no file away from another run that was faster and reads it
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        made.replace(kept)


def _file(key: str, number: int, parts: int) -> Path:
    return cache_folder() / (f"{key}.arrow" if parts == 1 else f"{key}-{number + 1}-of-{parts}.arrow")


def _read(parts: Mapping[Path, range]) -> datasets.Dataset:
    found = [datasets.Dataset.from_file(str(kept)) for kept in parts]
    for part, (kept, rows) in zip(found, parts.items(), strict=True):
        if len(part) != len(rows):
            raise OSError(f"{kept.name} holds {len(part)} examples instead of {len(rows)}; remove it")
    return datasets.concatenate_datasets(found)


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
