"""Texts become tokens once on each node, in a file that all its ranks read; later runs find it there.

The file's name is made of what it depends on: the data, the tokenizer's own files, what it makes of the first texts,
where texts are cut, and the code that makes tokens. So nothing is ever overwritten, and the folder can be emptied at
any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from accelerate.state import PartialState
from tqdm.auto import tqdm

from ..errors import AFLoRAError
from ..processes import first_on_node

_PROBED = 64  # texts by whose tokens a tokenizer is known that changes without its files: its code, its library
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

    def make(key: str, **options: Any) -> datasets.Dataset:
        watched = PartialState().is_main_process and sys.stderr.isatty()
        with tqdm(
            total=len(dataset), desc=f"tokenizing {name}", unit=" examples", delay=_PATIENCE, disable=not watched
        ) as bar:

            def tokenize_and_tell(examples: Columns) -> Columns:
                tokens = tokenize(examples)
                bar.update(len(tokens["labels"]))
                return tokens

            return dataset.map(
                tokenize_and_tell,
                batched=True,
                remove_columns=dataset.column_names,
                new_fingerprint=key,
                load_from_cache_file=False,
                **options,
            )

    def found_or_made() -> datasets.Dataset:
        key = _key(dataset, tokenizer, tokenize(dataset[:_PROBED]), settings)
        kept = cache_folder() / f"{key}.arrow"
        try:
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix="making-", dir=kept.parent) as folder:
                    made = Path(folder) / kept.name
                    make(key, cache_file_name=str(made))
                    _publish(made, kept)
            return _read(kept, len(dataset))
        except AFLoRAError:
            raise  # an example that cannot be tokenised
        except (OSError, ValueError) as error:  # read-only, full, or damaged: Arrow's errors are of both kinds
            if PartialState().is_local_main_process:
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                print(
                    f"The tokens of {name} are not kept: {kept} cannot be used ({reason}). Every process makes them "
                    f"for itself; HF_DATASETS_CACHE names another folder.",
                    file=sys.stderr,
                    flush=True,
                )
            return make(key, keep_in_memory=True)

    datasets.disable_progress_bars()  # they come at once, in every process and in files
    with _all_cores():
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


def _read(kept: Path, examples: int) -> datasets.Dataset:
    found = datasets.Dataset.from_file(str(kept))
    if len(found) != examples:
        raise OSError(f"it holds {len(found)} examples instead of {examples}; remove it")
    return found


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
