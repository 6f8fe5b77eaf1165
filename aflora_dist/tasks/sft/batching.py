"""Examples become the batch that a model is called with: padded, or packed end to end without attention across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..batches import Batch
from ..sampler import padded

IGNORED = -100  # a token that carries no loss


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Examples into rows of at most `width` tokens: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(max(width, lengths[i]))
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


class Collator:
    """Makes batches: input_ids, attention_mask or position_ids, and what carries loss.

    `positions` are the places, in the flattened batch, where the model says what comes next, and `targets` what does.

    Args:
        pad: The token that fills up.
        multiple: Rows are padded to a multiple of so many tokens.
        width: Pack: rows take several examples, of so many tokens together. None: an example each. Position ids start
            anew with each example (and with the padding), by which transformers' masks know where attention ends.
    """

    def __init__(self, pad: int, multiple: int = 1, width: int | None = None) -> None:
        self.pad, self.multiple, self.width = pad, multiple, width

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        lengths = [len(example["input_ids"]) for example in examples]
        rows = [[i] for i in range(len(examples))] if self.width is None else pack(lengths, self.width)
        width = padded(max(sum(lengths[i] for i in row) for row in rows), self.multiple)
        tokens = np.full((len(rows), width), self.pad, dtype=np.int64)
        labels = np.full_like(tokens, IGNORED)
        places = np.zeros_like(tokens)
        used = np.zeros_like(tokens)
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                part = slice(start, start + lengths[i])
                tokens[r, part], labels[r, part] = examples[i]["input_ids"], examples[i]["labels"]
                labels[r, start] = IGNORED  # nothing before it to say it
                places[r, part], used[r, part] = np.arange(lengths[i]), 1
                start += lengths[i]
            places[r, start:] = np.arange(width - start)
        at, before = np.nonzero(labels[:, 1:] != IGNORED)
        where = {"attention_mask": used} if self.width is None else {"position_ids": places}
        arrays = {"input_ids": tokens, **where, "positions": at * width + before, "targets": labels[at, before + 1]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class PromptCollator:
    """Prompts, padded on the left by the token `pad`, to be answered."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        prompts = [example["prompt_ids"] for example in examples]
        width = max(map(len, prompts))
        tokens = [[self.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        used = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(used)}
