"""`aflora data FILE|CONFIG`: what a training would be given: examples, what of them carries loss, lengths, labels.

All is read, checked and made into tokens as `aflora train` would; no weights are loaded, and nothing is trained.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from accelerate.state import PartialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import AFLoRAError
from ..notices import quiet_libraries
from ..options import Config
from ..plan.launches import Launch
from ..tasks.classification import Classification
from ..tasks.reading import FILES, listed, read_table
from ..tasks.sft import LanguageModelling
from ..tasks.sft.batching import IGNORED
from ..tasks.sft.examples import is_understood
from ..tasks.sources import HELD_OUT, load_from_hub
from ..training.build import create_task
from ..training.command_line import parse
from .terminal import console as create_console

_BINS, _WIDTH = 10, 50
_LONGEST = 1500  # characters of a stretch that are shown
_LEARNED, _GIVEN = "bold green", "dim"


def main(arguments: list[str]) -> int:
    """`aflora data`; returns the exit status."""
    quiet_libraries()
    parser = argparse.ArgumentParser(
        prog="aflora data",
        usage="%(prog)s [FILE | NAME | CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...] [--show N]",
        description="What a training would be given, by a file, a data set of the hub, or what `aflora train` takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many examples to show (3)")
    options, rest = parser.parse_known_args(arguments)
    PartialState(cpu=True)  # no GPU is needed, and none is taken
    config, _ = parse(_written_out(rest))
    launch: Any = Launch(engine="single", mixed_precision="no", on_gpu=False)
    # One by one: that a batch is more than there are is said in the end, and refuses nothing here.
    task = create_task(replace(config, train=replace(config.train, batch_size=1, accumulation=1)))
    task.load(launch, weights=False)
    task.limits.check_length(config.data.max_length)
    sampler, _ = task.batches(launch)
    console = create_console()
    (trained,), _ = task.tokens()
    measured = 0
    if isinstance(task, LanguageModelling):
        for row in range(min(options.show, len(trained))):
            _print_example(console, task, row, trained[row])
        _print_shares(console, trained)
        measured = len(task.held)
    elif isinstance(task, Classification):
        for row, example in enumerate(task.data.train.select(range(min(options.show, len(task.data.train))))):
            _print_labelled(console, task, row, example, len(trained[row]["input_ids"]))
        _print_labels(console, task)
        measured = sum(map(len, task.data.evaluation.values()))
    _print_lengths(console, np.asarray(sampler.sizes), config)
    console.print("\n" + _updates(config, len(sampler.lengths)))
    console.print(f"{measured:,} examples are there to measure with.")
    return 0


def _updates(config: Config, examples: int) -> str:
    """How many updates there are of so many examples."""
    size = config.train.batch_size
    per_epoch, left_out = divmod(examples, size)
    if not per_epoch:
        return f"{examples:,} examples are fewer than one batch of train.batch_size={size}: lower it to train on them."
    total = config.train.updates(per_epoch)
    others = f" ({left_out:,} are left out at its end, others in each)" if left_out else ""
    updates = f"{per_epoch:,} update{'s' * (per_epoch > 1)} of {size} examples{others}"
    return f"An epoch has {updates}; {total / per_epoch:g} epochs are {total:,} updates."


def _written_out(arguments: Sequence[str]) -> list[str]:
    """What `aflora train` would be told, where only a file or a data set is named: task, model, and what to measure."""
    first, *rest = arguments or [""]
    if not first or first.startswith("--") or first.lower().endswith((".yaml", ".yml")):
        return [*arguments]
    words = [word.partition("=") for word in rest]
    said = {n: v if sign else other[0] for (n, sign, v), other in zip(words, [*words[1:], ("", "", "")], strict=False)}
    measured = said.keys() & {"--data.hold_out", "--data.validation_file", "--data.validation_split"}
    if first.lower().endswith(FILES) or os.path.isfile(first):
        more, columns = ["--data.train_file", first], read_table(first, []).columns
        if not measured:
            more += ["--data.validation_file", first]
    else:
        more, columns = ["--data.name", first], ["messages"]
        if first != "demo":
            splits = load_from_hub(first, said.get("--data.subset"), said.get("--data.revision"), "name a file")
            columns = next(iter(splits.values())).column_names
            if not measured and not splits.keys() & {*HELD_OUT}:
                more += ["--data.validation_split", said.get("--data.train_split", "train")]
    if "--preset" in said:
        return [*more, *rest]
    if "--data.task" not in said:
        more += ["--data.task", _guessed(first, columns, said)]
    return [*more, *([] if "--model.name" in said else ["--model.name", "demo"]), *rest]


def _guessed(name: str, columns: list[str], said: Collection[str]) -> str:
    """The task of what has these columns."""
    if "--data.text_columns" in said or "--data.label_column" in said:
        return "files"
    if "--data.columns" in said or is_understood(columns):
        return "sft"
    if "label" in columns:
        return "files"
    raise AFLoRAError(
        f"{name} has the columns {listed(columns)}. Which is what? Of a classifier's say --data.text_columns and "
        f'--data.label_column; of a language model\'s --data.columns \'{{"prompt": ..., "completion": ...}}\'.'
    )


def _print_example(console: Console, task: LanguageModelling, row: int, example: dict[str, Any]) -> None:
    """Its text, with the tokens that carry loss in another colour, or in lines that say so."""
    ids, labels = example["input_ids"], example["labels"]
    count = sum(label != IGNORED for label in labels)
    console.print(Text(f"\nExample {row + 1}: {len(ids):,} tokens, of which {count:,} carry loss", style="bold"))
    in_colour = console.color_system is not None and not console.no_color
    whole = Text()
    for learned, stretch in _stretches(ids, labels):
        text = task.tokenizer.decode(stretch, clean_up_tokenization_spaces=False)
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in _shortened(text))
        if in_colour:
            whole.append(text, style=_LEARNED if learned else _GIVEN)
        else:
            lead = "  learned | " if learned else "    given | "
            whole.append("".join(f"{lead}{line}\n" for line in text.removesuffix("\n").split("\n")))
    console.print(whole, soft_wrap=not in_colour, end="\n" if in_colour else "")


def _stretches(ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    """Tokens one after the other that all carry loss, or of which none does."""
    for learned, stretch in groupby(zip(ids, labels, strict=True), key=lambda token: token[1] != IGNORED):
        yield learned, [number for number, _ in stretch]


def _shortened(text: str) -> str:
    half = _LONGEST // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} [... {left_out:,} more characters ...] {text[-half:]}"


def _print_shares(console: Console, trained: Any) -> None:
    tokens = sum(map(len, trained["input_ids"]))
    count = sum(sum(label != IGNORED for label in labels) for labels in trained["labels"])
    console.print(f"\nOf {tokens:,} tokens {count:,} carry loss ({count / max(tokens, 1):.0%}).")


def _print_labelled(console: Console, task: Classification, row: int, example: dict[str, Any], tokens: int) -> None:
    names, label = task.data.labels, example["label"]
    said = f"{label:g}" if names is None else names[label]
    console.print(Text(f"\nExample {row + 1}: {tokens:,} tokens, label {said!r}", style="bold"))
    for column in ("text", "text_pair"):
        if column in example:
            console.print(f"  {_shortened(example[column])}")


def _print_labels(console: Console, task: Classification) -> None:
    """How many examples each class has, or between which numbers labels lie."""
    splits = {"train": task.data.train, **task.data.evaluation}
    names = task.data.labels
    table = Table(title="\nLabels", title_justify="left")
    table.add_column("label" if names else "labels")
    for split in splits:
        table.add_column(split, justify="right")
    found = {split: [*dataset["label"]] for split, dataset in splits.items()}
    if names is None:
        for what, of in (("lowest", min), ("mean", lambda values: sum(values) / len(values)), ("highest", max)):
            table.add_row(what, *(f"{of(values):.4g}" for values in found.values()))
    else:
        counts = {split: Counter(values) for split, values in found.items()}
        for number, name in enumerate(names):
            shares = [f"{c[number]:,} ({c[number] / max(c.total(), 1):.0%})" for c in counts.values()]
            table.add_row(name, *shares)
    console.print(table)


def _print_lengths(console: Console, lengths: np.ndarray, config: Config) -> None:
    """A histogram of how many tokens examples have."""
    most = config.data.max_length
    at_most = int((lengths >= most).sum())
    half, nearly = (int(np.quantile(lengths, share)) for share in (0.5, 0.95))
    console.print(
        f"\nTokens in an example: {lengths.min():,} to {lengths.max():,}, half of them at most {half:,}, 95% at most "
        f"{nearly:,}; {at_most:,} have all of data.max_length={most:,}."
    )
    low, high = int(lengths.min()), int(lengths.max())
    edges = np.unique(np.linspace(low, high + 1, min(_BINS, high - low + 1) + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    width = len(f"{high:,}")
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "█" * -(-int(count) * _WIDTH // max(int(counts.max()), 1))
        console.print(
            Text(f"  {start:>{width},} to {end - 1:>{width},} ").append(bar, style="cyan").append(f" {count:,}")
        )
