"""Batches of a task for one rank: which examples, padded to what, prepared by whom. Knows no engine and no method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorWithPadding

from ..errors import AFLoRAError
from ..options import Config
from .data import Data
from .limits import Limits
from .reading import shown
from .sampler import EvaluationSampler, GlobalBatchSampler, padded
from .tokens import tokenized

Batch = dict[str, Tensor]
# Small ones waste less on padding; a GPU wants large ones.
_TOKENS_PER_MICRO_BATCH = {"cpu": 256, "gpu": 16_384}
_LOOKED_AT = 64  # training texts
_PAD_TO_MULTIPLE = {"cpu": 1, "gpu": 8}  # for tensor cores


def create_loaders(
    config: Config, data: Data, tokenizer: Any, limits: Limits, accelerator: Accelerator
) -> tuple[GlobalBatchSampler, DataLoader[Batch], dict[str, DataLoader[Batch]]]:
    """This rank's training batches (one micro-batch each), and its share of each evaluation split. A collective.

    Raises:
        AFLoRAError: On every rank: there is less than one batch of training examples, a token of which the model knows
            nothing, or a rank failed.
    """
    enough(config, len(data.train))  # before time is spent
    texts = Texts(config, tokenizer, limits, accelerator)
    _check_words(tokenizer, data.train["text"][:_LOOKED_AT], limits)
    shape, collate = texts.shape, texts.collate
    train_set = texts.tokens(data.train, "the training split")
    sampler = create_sampler(config, lengths(train_set, shape.multiple), shape, sizes=lengths(train_set, 1))
    evaluation = {}
    for split, dataset in data.evaluation.items():
        tokens = texts.tokens(dataset, f"the {split} split")
        evaluation[split] = evaluation_loader(config, tokens, collate, shape)
    return sampler, loader(train_set, sampler, collate, shape.on_gpu), evaluation


def _check_room(tokenizer: Any, length: int, pair: bool) -> None:
    """Refuse to cut texts to nothing."""
    own = tokenizer.num_special_tokens_to_add(pair=pair)
    if length < own + 1 + pair:
        raise AFLoRAError(
            f"data.max_length={length} leaves nothing of the texts: the tokenizer adds {own} tokens of its own."
        )


def _check_words(tokenizer: Any, texts: Sequence[str], limits: Limits) -> None:
    """Refuse to train on nothing but unknown words, or none, which a model does without a complaint."""
    written = [text for text in texts if text.strip()]
    if len(written) < _LOOKED_AT // 2:
        return
    found = {token for ids in tokenizer(written, add_special_tokens=False)["input_ids"] for token in ids}
    if not found - {tokenizer.unk_token_id}:
        left = f"all are {tokenizer.unk_token}" if found else "nothing is left of them"
        raise AFLoRAError(
            f"The tokenizer of {limits.name!r} knows no word of the first {len(written)} training texts, such as "
            f"{shown(written[0])}: {left}. Is it the model's own, whole and of the kind that its tokenizer_config.json "
            f"says, and for this language?"
        )


class BatchShape:
    """Which rank this is, and what batches must look like there.

    Args:
        positions: Tokens that the model takes at a time, if that is limited.
        max_length: Tokens after which examples are cut.
    """

    def __init__(self, accelerator: Accelerator, positions: int | None = None, max_length: int = 0) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.on_gpu = accelerator.device.type == "cuda"
        kind = "gpu" if self.on_gpu else "cpu"
        self.multiple = _PAD_TO_MULTIPLE[kind]
        if positions is not None and padded(max_length, self.multiple) > positions:
            self.multiple = 1
        self.tokens = _TOKENS_PER_MICRO_BATCH[kind]


class Texts:
    """How texts, and pairs of them, become batches on this rank, in training as in predicting.

    Raises:
        AFLoRAError: They cannot be padded.
    """

    def __init__(self, config: Config, tokenizer: Any, limits: Limits, accelerator: Accelerator) -> None:
        self.length, self.tokenizer, self.limits = config.data.max_length, tokenizer, limits
        self.says = accelerator.is_main_process
        self.shape = BatchShape(accelerator, limits.positions, self.length)
        if config.data.pad_to_max_length:
            self.shape.multiple = self.length
        limits.check_padding(tokenizer)
        # On the left, as tokenizers of generating models have it, padding moves a text to other positions (GPT-2,
        # BART): what is said of it would hang on the texts beside it.
        tokenizer.padding_side = "left" if limits.at_last else "right"
        self.collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=self.shape.multiple)

    def tokens(self, dataset: datasets.Dataset, name: str) -> datasets.Dataset:
        """Their tokens; how many are cut is said. A collective.

        Raises:
            AFLoRAError: On every rank: a token of which the model knows nothing; no room for a text.
        """
        _check_room(self.tokenizer, self.length, "text_pair" in dataset.column_names)
        tokens = tokenized(dataset, self.tokenizer, self.length, name)
        self.limits.check_tokens(self.tokenizer, tokens, name)
        full = sum(length >= self.length for length in lengths(tokens, 1))
        if full and self.says:
            said = f"have {self.length} tokens or more, and are cut there (data.max_length)"
            print(f"Of {len(tokens):,} examples of {name}: {full:,} {said}.", flush=True)
        return tokens


def enough(config: Config, examples: int) -> None:
    """Refuse a training split that is smaller than one batch."""
    if examples < config.train.batch_size:
        raise AFLoRAError(
            f"The training split has {examples} examples, fewer than one batch: train.batch_size="
            f"{config.train.batch_size}. Lower it."
        )


def create_sampler(config: Config, lengths: Sequence[int], shape: BatchShape, **options: Any) -> GlobalBatchSampler:
    """This rank's hand of every global batch, as the configuration has it."""
    return GlobalBatchSampler(
        lengths,
        config.train.batch_size,
        micro_batches=config.train.accumulation,
        tokens=config.data.tokens_per_micro_batch or shape.tokens,
        epochs=config.train.passes(len(lengths) // config.train.batch_size),
        seed=config.train.seed,
        rank=shape.rank,
        world_size=shape.world_size,
        **options,
    )


def loader(dataset: Any, sampler: Sampler[list[int]], collate: Any, beside: bool) -> DataLoader[Batch]:
    """Batches as the sampler says; `beside`: made by another process while the model computes, in pinned memory.

    A CPU has no time to spare for another process, and nothing to pin memory for.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=int(beside),
        pin_memory=beside,
        persistent_workers=beside,
    )


def evaluation_loader(config: Config, dataset: Any, collate: Any, shape: BatchShape) -> DataLoader[Batch]:
    """This rank's share of an evaluation split, or of prompts (prompt_ids) to be answered."""
    asked = "prompt_ids" in dataset.column_names
    counts = lengths(dataset, 1, "prompt_ids") if asked else lengths(dataset, shape.multiple)
    size = config.train.eval_batch_size
    order = EvaluationSampler(counts, size, rank=shape.rank, world_size=shape.world_size)
    return loader(dataset, order, collate, shape.on_gpu)


def lengths(dataset: Any, multiple: int, column: str = "input_ids") -> list[int]:
    """Tokens of each example, rounded up as a batch is."""
    parts = dataset.with_format("arrow")[:][column].chunks
    return [padded(count, multiple) for part in parts for count in part.value_lengths().to_pylist()]


def move(batch: Any, device: torch.device) -> Batch:
    """The batch on the device; from pinned memory while the device computes."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
