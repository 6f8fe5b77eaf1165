"""Causal language modelling as a task of `aflora train`."""

from __future__ import annotations

import math
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...compat.accelerate import unwrap
from ...errors import AFLoRAError
from ...options import Config
from ..base import Evaluation
from ..batches import Batch, BatchShape, create_sampler, enough, evaluation_loader, lengths, loader, move
from ..dtypes import check_weights
from ..limits import Limits
from ..model import load_language_model, load_tokenizer, outline_language_model, unadapted
from ..sampler import GlobalBatchSampler
from ..tokens import made_once
from .answers import answer, last_number
from .batching import Collator, PromptCollator
from .encode import SAID, Encoder
from .examples import load_examples, question
from .loss import ChunkedCrossEntropy
from .rehearsal import beginnings, check_kind, check_no_future, check_own_loss, check_packing


class LanguageModelling:
    """Fine-tuning a causal language model; the loss is the mean over the global batch's loss-carrying tokens."""

    name = "sft"
    labels: list[str] | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.train_examples = 0

    def load(self, accelerator: Accelerator, *, weights: bool = True) -> tuple[Any, list[str]]:
        check_weights(self.config.model, accelerator)
        self.train, self.held = load_examples(self.config.data, self.config.train.seed)
        self._check_answers()
        self.train_examples = len(self.train)
        if weights:
            model, self.tokenizer = load_language_model(self.config.model, accelerator)
        else:
            model = outline_language_model(self.config.model)
            self.tokenizer = load_tokenizer(self.config.model, language_model=True)
        check_kind(model)
        self.limits = Limits.of(model, self.config.model.name)
        return model, []

    def _check_answers(self) -> None:
        answers = self.held["answer"][:] if "answer" in self.held.column_names else []
        self.asked = [row for row, right in enumerate(answers) if right not in (None, "")]
        for row in self.asked:
            if last_number(answers[row]) is None:
                raise AFLoRAError(
                    f"Example {row + 1} of the evaluation data has the answer {answers[row]!r}, in which there is no "
                    f"number: answers are compared by their last number. Leave the column out."
                )

    def metrics(self) -> list[str]:
        answered = [] if self.prompt_batches is None else ["exact_match"]
        return [*answered, *([] if self.loss_batches is None else ["loss", "perplexity"])]

    def tokens(self) -> tuple[list[Any], list[Any]]:
        measured = [batches.dataset for batches in (self.loss_batches, self.prompt_batches) if batches is not None]
        return [self.trained], [*measured, [self.held[row]["answer"] for row in self.asked]]

    def batches(self, accelerator: Accelerator) -> tuple[GlobalBatchSampler, DataLoader[Batch]]:
        data = self.config.data
        shape = BatchShape(accelerator, self.limits.positions, data.max_length)
        enough(self.config, len(self.train))  # before time is spent
        self.limits.check_padding(self.tokenizer)
        train = self._tokens(self.train, "the training split", accelerator)
        self.train_examples = len(train)
        enough(self.config, len(train))
        self._load_evaluation(shape, accelerator)
        pad = self.tokenizer.pad_token_id
        sampler = create_sampler(
            self.config,
            lengths(train, 1 if data.packing else shape.multiple),
            shape,
            counts=train["count"][:],
            packed=data.packing,
            sizes=lengths(train, 1),
        )
        collate = Collator(pad, shape.multiple, data.max_length if data.packing else None)
        self.trained = train.select_columns(["input_ids", "labels"])
        self.sample = beginnings(self.trained, Collator(pad, shape.multiple))
        return sampler, loader(self.trained, sampler, collate, shape.on_gpu)

    def _tokens(self, dataset: datasets.Dataset, name: str, accelerator: Accelerator) -> datasets.Dataset:
        """Tokens of the examples; those without loss are left out, unless they are asked for an answer."""
        data = self.config.data
        encode = Encoder(self.tokenizer, data.max_length, data.loss_on, data.system, name)
        plain = "text" in dataset.column_names
        tokens = made_once(dataset, self.tokenizer, encode, encode.settings, name, several_rows=plain)
        self.limits.check_tokens(self.tokenizer, tokens, name)
        counts, cut = tokens["count"][:], sum(tokens["cut"][:])
        carrying = [i for i, count in enumerate(counts) if count]
        said = [f"{cut:,} cut to data.max_length={data.max_length} tokens"] if cut else []
        if len(counts) > len(dataset):
            said.append(
                f"they are pieces of {len(dataset):,} texts, of at most data.max_length={data.max_length} tokens"
            )
        if "prompt_ids" not in tokens.column_names and len(carrying) < len(tokens):
            said.append(f"{len(tokens) - len(carrying):,} left out: no token of theirs carries loss")
            tokens = tokens.select(carrying)
        notes = tokens["notes"][:]
        said += [f"{number:,} {what}" for note, what in SAID.items() if (number := sum(bool(n & note) for n in notes))]
        self.end = encode.end_of_turn()
        end = None if plain or not carrying else self.end.token
        if end is not None and not any(end in labels for labels in tokens["labels"]):
            said.append(f"in none {self.tokenizer.convert_ids_to_tokens(end)!r}, the end of a turn, carries loss")
        if said and accelerator.is_main_process:
            print(f"Of {len(counts):,} examples of {name}: {'; '.join(said)}.", flush=True)
        if not carrying and "prompt_ids" not in tokens.column_names:
            raise AFLoRAError(
                f"No example of {name} has a token that carries loss. Raise data.max_length={data.max_length}, or see "
                f"whether the assistant says anything in it (data.loss_on=all counts every token)."
            )
        return tokens

    def _load_evaluation(self, shape: BatchShape, accelerator: Accelerator) -> None:
        tokens = self._tokens(self.held, "the evaluation split", accelerator)
        pad = self.tokenizer.pad_token_id
        carrying = tokens.select([i for i, count in enumerate(tokens["count"][:]) if count])
        carrying = carrying.select_columns(["input_ids", "labels"])
        self.loss_batches = self.prompt_batches = None
        if len(carrying):
            self.loss_batches = evaluation_loader(self.config, carrying, Collator(pad, shape.multiple), shape)
        if self.asked:
            prompts = tokens.select(self.asked).select_columns(["prompt_ids"])
            self.limits.check_room(
                lengths(prompts, 1, "prompt_ids"),
                self.config.data.max_new_tokens,
                lambda place: f"Example {self.asked[place] + 1} of the evaluation data",
                "Leave it out, or lower data.max_new_tokens.",
            )
            self.prompt_batches = evaluation_loader(self.config, prompts, PromptCollator(pad), shape)

    def rehearse(self, model: nn.Module, accelerator: Accelerator) -> None:
        inner: Any = unwrap(accelerator, model)
        self.cross_entropy = ChunkedCrossEntropy(inner, smoothing=self.config.train.label_smoothing)
        model.eval()
        vocabulary = min(len(self.tokenizer), self.limits.rows)
        tokens = torch.arange(8, device=accelerator.device).unsqueeze(0) % vocabulary
        self.cross_entropy.rehearse(model, {"input_ids": tokens})
        if self.cross_entropy.whole and accelerator.is_main_process:
            print(
                f"{type(unadapted(inner)).__name__} does more with its logits than its head says: its loss holds "
                f"all logits of a micro-batch at once.",
                flush=True,
            )
        # In half precision, and with quantised weights, the same sum comes out otherwise in another batch.
        exact = str(accelerator.mixed_precision) == "no" and all(p.dtype == torch.float32 for p in inner.parameters())
        check_no_future(model, unadapted(inner), tokens, 1e-5 if exact else 3e-2)
        sample = move(self.sample, accelerator.device)
        check_own_loss(model, unadapted(inner), sample, self.loss, 1e-3 if exact else 3e-2)
        if self.config.data.packing:
            check_packing(model, inner, tokens)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in ("positions", "targets")}
        return self.cross_entropy(model, inputs, batch["positions"], batch["targets"])

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        model.eval()
        metrics, samples = {}, ""
        if self.prompt_batches is not None:
            asked = self.held.select(self.asked)
            metrics["exact_match"], samples = answer(
                model,
                self.prompt_batches,
                [question(row) for row in asked],
                list(asked["answer"]),
                self.tokenizer,
                self.config.data.max_new_tokens,
                self.end,
                accelerator,
            )
        if self.loss_batches is not None:
            loss = self._mean_loss(model, self.loss_batches, accelerator)
            metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return Evaluation(metrics, samples)

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, batches: DataLoader[Batch], accelerator: Accelerator) -> float:
        """Mean over the tokens of all examples, each counted once."""
        found = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        order: Any = batches.batch_sampler
        for mine, batch in zip(order.shares(), batches, strict=True):
            loss = self.loss(model, move(batch, accelerator.device)).double()
            if mine:  # else another rank's example, computed for nobody
                found += torch.stack([loss, loss.new_tensor(len(batch["targets"]))])
        total, tokens = accelerator.reduce(found, "sum").tolist()
        return float(total / tokens)
