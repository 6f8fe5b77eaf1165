"""Rows become predictions, part by part: classes and numbers as in the evaluation of a training, answers likewise."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import AFLoRAError
from ..tasks.batches import BatchShape, Texts, evaluation_loader, lengths
from ..tasks.data import metrics_for, positive_class, refuse_swallowed_rows
from ..tasks.evaluation import compute, gather_logits
from ..tasks.glue import TASKS
from ..tasks.labels import given_labels
from ..tasks.limits import Limits
from ..tasks.reading import listed, plain_header, read_table, shown
from ..tasks.sft.answers import Answer, generate_answers, last_number
from ..tasks.sft.batching import PromptCollator
from ..tasks.sft.encode import Encoder
from ..tasks.sft.examples import load_prompts
from ..tasks.tokens import made_once
from .partial import Values
from .trained import TrainedModel

Done = Callable[[int], Any]


def asking(file: str, trained: TrainedModel) -> _Labels | _Answers:
    """What of a file this model is to be asked. A collective.

    Raises:
        AFLoRAError: On every rank: the file cannot be read, lacks a column, or a row has nothing to ask; with its line.
    """
    return _Answers(file, trained) if trained.says == "an answer" else _Labels(file, trained)


class _Labels:
    """Texts, and pairs of texts, of which a class or a number is predicted.

    Attributes:
        columns: Of the file, in its order.
        rows: How many it has.
        new: The names of what is predicted of each.
        part: So many rows are predicted, and kept, at a time.
        plain: It is a TSV without quoting, see `read_table`.
    """

    part = 16_384  # long texts are batched with long ones among so many
    plain = False

    def __init__(self, file: str, trained: TrainedModel) -> None:
        self.config, self.labels = trained.config, trained.labels
        task = None if "data.text_columns" in trained.said else TASKS.get(self.config.data.task)  # GLUE's own names
        self.texts = [*(self.config.data.text_columns if task is None else task.text_columns)]
        if own := _own_columns(file, self.config.data.task):
            self.plain, said = True, trained.said
            self.texts = self.texts if "data.text_columns" in said else own[:-1]
            label = self.config.data.label_column if "data.label_column" in said else own[-1]
            self.config = replace(self.config, data=replace(self.config.data, label_column=label))
        data = self.config.data
        whole = read_table(file, {*self.texts, data.label_column, *data.columns.values()}, self.plain)
        self.columns, self.table = whole.columns, whole.renamed(data.columns)
        for column, source in data.columns.items():
            if "data.columns" in trained.said and column in self.texts and source not in whole.header:
                raise whole.lacks(source)
        for column in self.texts:
            if column not in self.table.columns:
                raise AFLoRAError(f"{self.table.lacks(column)} --data.text_columns says which hold the text.")
            self.table.check_text(column)
        if "data.label_column" in trained.said and data.label_column not in self.table.columns:
            raise self.table.lacks(data.label_column)
        if not 1 <= len(self.texts) <= 2 or len({*self.texts}) < len(self.texts):
            raise AFLoRAError(f"data.text_columns names one column, or two different ones, not {self.texts}.")
        if data.label_column in self.table.columns:
            refuse_swallowed_rows(self.table, data, self.texts)
        self.rows = len(self.table.lines)
        self.new = ["prediction", *(f"probability_{label}" for label in self.labels or ())]

    def prepare(self, model: Any, tokenizer: Any, limits: Limits, accelerator: Accelerator) -> None:
        """Tokenise; an AFLoRAError on every rank for a row that the model cannot take. A collective."""
        self.model, self.accelerator = model, accelerator
        texts = Texts(self.config, tokenizer, limits, accelerator)
        self.shape, self.collate = texts.shape, texts.collate
        names = dict(zip(self.texts, ("text", "text_pair"), strict=False))
        rows = self.table.rows.select_columns(self.texts)
        rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
        rows = rows.add_column("label", [0.0 if self.labels is None else 0] * self.rows)  # what they are is not known
        self.tokens = texts.tokens(rows, "the file")

    def predict(self, start: int, stop: int, done: Done) -> list[Values]:
        """What is predicted of these rows, on the main process; nothing elsewhere. A collective."""
        part = self.tokens.select(range(start, stop))
        batches = evaluation_loader(self.config, part, self.collate, self.shape)
        width = 1 if self.labels is None else len(self.labels)
        logits = gather_logits(self.model, batches, stop - start, width, self.accelerator, done).cpu()
        if not torch.isfinite(logits).all():  # all ranks have them
            row = start + int((~torch.isfinite(logits)).any(-1).nonzero()[0])
            raise AFLoRAError(
                f"{self.table.where(row)}: what the model computes of it is no finite number: the training diverged, "
                f"or a file is damaged."
            )
        if not self.accelerator.is_main_process:
            return []
        if self.labels is None:
            return [[_shortest(value)] for value in logits.squeeze(-1)]
        best, chances = logits.argmax(-1).tolist(), torch.softmax(logits, -1)
        pairs = zip(best, chances, strict=True)
        return [[self.labels[number], *map(_shortest, chance)] for number, chance in pairs]

    def summary(self, values: Callable[[], Iterator[Values]]) -> Iterator[str]:
        """What a person wants to know of it all: a line each."""
        found = [row[0] for row in values()]
        if self.labels is None:
            yield f"  from {min(found):g} to {max(found):g}, {statistics.fmean(found):g} on average"
        else:
            width = min(max(map(len, self.labels)), 40)
            for label, count in Counter(found).most_common(20):
                yield f"  {label[:40]:<{width}}  {count:>{len(f'{self.rows:,}')},}  {count / self.rows:6.1%}"
        if self.config.data.label_column in self.table.columns:
            yield from self._compared(found)

    def _compared(self, found: Sequence[Any]) -> Iterator[str]:
        """How what is predicted fits to labels that the file has, as the evaluation of the training measures it."""
        data, names = self.config.data, self.labels
        given, unknown, by_number = given_labels(self.table, data.label_column, names)
        if unknown is not None:
            label = shown(str(self.table.rows[unknown][data.label_column]))
            known = "no number" if names is None else f"none of {listed(names)}"
            yield f"{self.table.where(unknown)}: the label {label} is {known}, so nothing is compared."
            return
        there = [row for row, label in enumerate(given) if label is not None]
        if not there:
            return
        numbers = found if names is None else [names.index(label) for label in found]
        values = compute(
            metrics_for(data.task, names),
            np.asarray([given[row] for row in there], dtype=np.float64),
            np.asarray([numbers[row] for row in there], dtype=np.float32).astype(np.float64),
            1 if names is None or len(names) != 2 else positive_class(data, names),
        )
        if by_number:
            first = shown((names or [""])[0])
            yield f"  labels in column {data.label_column!r} are taken as numbers of classes: 0 is {first}"
        said = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        yield f"{said}  ({len(there):,} rows with a label in column {data.label_column!r})"


def _own_columns(file: str, name: str) -> list[str]:
    """Columns of text and of the label, as GLUE's own TSV of this task calls them; none of another file."""
    task, path = TASKS.get(name), Path(file)
    if task is None or path.suffix.lower() != ".tsv" or not os.access(path, os.R_OK) or path.is_dir():
        return []
    columns = [str(column) for column in task.tsv_columns]
    return columns if {*columns[:-1]} <= {*plain_header(path)} else []


def _shortest(value: Any) -> float:
    """A float32 as the shortest decimal number that stands for it."""
    return float(str(np.float32(value)))


class _Answers:
    """As `_Labels`, of prompts that a language model answers, greedily, as in the evaluation of a training."""

    part, plain = 512, False
    new: list[str]

    def __init__(self, file: str, trained: TrainedModel) -> None:
        self.config, self.file = trained.config, file
        data = self.config.data
        self.table, self.prompts = load_prompts(file, data)
        if "data.columns" in trained.said and not {*data.columns.values()} & {*self.table.header}:
            raise self.table.lacks(next(iter(data.columns.values()), ""))
        self.columns = read_table(file, set()).columns
        self.rows = len(self.table.lines)
        self.new = ["prediction"]

    def prepare(self, model: Any, tokenizer: Any, limits: Limits, accelerator: Accelerator) -> None:
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        data = self.config.data
        self.shape = BatchShape(accelerator, limits.positions, data.max_length)
        limits.check_padding(tokenizer)
        # Nothing is learned: a template need not tell what the assistant has said.
        encode = Encoder(tokenizer, data.max_length, "all", data.system, "the file")
        self.end = encode.end_of_turn()
        self.tokens = made_once(self.prompts, tokenizer, encode, encode.settings, "the file")
        limits.check_tokens(tokenizer, self.tokens, "the file")
        self.tokens = self.tokens.select_columns(["prompt_ids"])
        limits.check_room(
            lengths(self.tokens, 1, "prompt_ids"),
            data.max_new_tokens,
            lambda row: f"{self.table.where(row)}: it",
            "Leave the row out, or lower --data.max_new_tokens.",
        )

    def predict(self, start: int, stop: int, done: Done) -> list[Values]:
        part: datasets.Dataset = self.tokens.select(range(start, stop))
        collate = PromptCollator(self.tokenizer.pad_token_id)
        batches = evaluation_loader(self.config, part, collate, self.shape)
        most = self.config.data.max_new_tokens
        said = generate_answers(self.model, batches, self.tokenizer, most, self.end, self.accelerator, done)
        return [[text] for _, text in sorted(gather_object(said))]

    def summary(self, values: Callable[[], Iterator[Values]]) -> Iterator[str]:
        found = [row[0] for row in values()]
        for text in found[:2]:
            yield f"  {shown(text, 100)}"
        if silent := sum(not text for text in found):
            yield f"  {silent:,} answers are empty"
        right = self.table.rows["answer"][:]
        there = [row for row, answer in enumerate(right) if answer not in (None, "")]
        if odd := [row for row in there if last_number(right[row]) is None]:
            told = shown(str(right[odd[0]]))
            yield f"{self.table.where(odd[0])}: the answer {told} has no number, so nothing is compared."
        elif there:
            share = sum(Answer(row, found[row], right[row]).correct for row in there) / len(there)
            yield f"exact_match {share:.4f}  ({len(there):,} rows with an answer in column 'answer')"
