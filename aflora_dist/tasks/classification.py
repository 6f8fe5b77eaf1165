"""The task of labelling texts, and pairs of texts: GLUE, the demo's reviews, files of your own."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..training.config import Config
from .base import Evaluation
from .batches import Batch, create_loaders
from .data import load_data
from .evaluation import evaluate, measured
from .model import check_quantization, load_base, load_tokenizer, outline_base, storage_dtype
from .sampler import GlobalBatchSampler


class Classification:
    """A sequence classifier, or a regression."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = config.data.task
        self.train_examples = 0

    def load(self, accelerator: Accelerator, *, weights: bool = True) -> tuple[Any, list[str]]:
        self.data = load_data(self.config.data, self.config.train.seed)
        self.train_examples = len(self.data.train)
        check_quantization(self.config.model, accelerator)
        if not weights:
            model, head = outline_base(self.config.model, self.data.labels)
            self.tokenizer = load_tokenizer(self.config.model)
            return model, head
        model, self.tokenizer, head = load_base(
            self.config.model, self.data.labels, storage=storage_dtype(self.config.model, accelerator)
        )
        return model, head

    def metrics(self) -> list[str]:
        return measured(self.data)

    def tokens(self) -> tuple[list[Any], list[Any]]:
        return [self.train], [batches.dataset for batches in self.evaluation.values()]

    def batches(self, accelerator: Accelerator) -> tuple[GlobalBatchSampler, DataLoader[Batch]]:
        sampler, batches, self.evaluation = create_loaders(self.config, self.data, self.tokenizer, accelerator)
        self.train = batches.dataset
        return sampler, batches

    def rehearse(self, model: nn.Module, accelerator: Accelerator) -> None:
        return

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss * len(batch["labels"])

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        return Evaluation(evaluate(model, self.evaluation, self.data, accelerator))
