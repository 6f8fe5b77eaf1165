"""The task of labelling texts, and pairs of texts: GLUE, the demo's reviews, files of your own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..compat.accelerate import unwrap
from ..compat.patch import patch
from ..errors import AFLoRAError
from ..options import Config
from .base import Evaluation
from .batches import Batch, create_loaders, move
from .data import load_data
from .dtypes import check_weights
from .evaluation import evaluate, odd_evaluation
from .glue import metric_names
from .limits import Limits
from .model import load_base, load_tokenizer, outline_base, unadapted
from .sampler import GlobalBatchSampler


class Classification:
    """A sequence classifier, or a regression."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = config.data.task
        self.train_examples = 0
        self.labels: list[str] | None = None

    def load(self, accelerator: Accelerator, *, weights: bool = True) -> tuple[Any, list[str]]:
        self.data = load_data(self.config.data, self.config.train.seed)
        self.train_examples, self.labels = len(self.data.train), self.data.labels
        if self.data.labels is None and self.config.train.label_smoothing:
            raise AFLoRAError(
                "train.label_smoothing is for classes, and the labels are numbers to regress to: drop it."
            )
        # `aflora data`, which needs no weights, takes what is trained on where there is nothing else.
        if weights and accelerator.is_main_process:
            print(*(f"{line}\n" for line in odd_evaluation(self.config.data, self.data)), sep="", end="", flush=True)
        check_weights(self.config.model, accelerator)
        if weights:
            model, self.tokenizer, head = load_base(self.config.model, self.data.labels, accelerator)
        else:
            model, head = outline_base(self.config.model, self.data.labels)
            self.tokenizer = load_tokenizer(self.config.model)
        self.limits = Limits.of(model, self.config.model.name)
        return model, head

    def metrics(self) -> list[str]:
        return metric_names(self.data.evaluation, self.data.metrics)

    def tokens(self) -> tuple[list[Any], list[Any]]:
        return [self.train], [batches.dataset for batches in self.evaluation.values()]

    def batches(self, accelerator: Accelerator) -> tuple[GlobalBatchSampler, DataLoader[Batch]]:
        sampler, batches, self.evaluation = create_loaders(
            self.config, self.data, self.tokenizer, self.limits, accelerator
        )
        self.train = batches.dataset
        collate: Any = batches.collate_fn
        self.sample = collate([batches.dataset[i] for i in range(min(2, self.train_examples))])
        return sampler, batches

    @torch.no_grad()
    def rehearse(self, model: nn.Module, accelerator: Accelerator) -> None:
        model.eval()
        inner = unwrap(accelerator, model)
        batch = move(self.sample, accelerator.device)
        with _without_regularisation(inner):
            found = model(**batch)
        logits, labels = found.logits.float(), batch["labels"]
        ours = (
            F.mse_loss(logits.squeeze(-1), labels.float())
            if self.data.labels is None
            else F.cross_entropy(logits, labels)
        )
        if not torch.allclose(found.loss.float(), ours, rtol=3e-2, atol=1e-3):
            raise AFLoRAError(
                f"{type(unadapted(inner)).__name__} computes a loss of {found.loss.item():.4f} for "
                f"examples whose mean is {ours.item():.4f}: it adds a term, or weighs them otherwise, and would not be "
                f"trained as it is meant to be. Switch that off in its config.json, or use another model."
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        found = model(**batch)
        loss: Tensor = found.loss
        if smoothing := self.config.train.label_smoothing:
            scores, labels = found.logits.float(), batch["labels"]  # what else the model's loss holds stays
            loss = loss + F.cross_entropy(scores, labels, label_smoothing=smoothing) - F.cross_entropy(scores, labels)
        return loss * len(batch["labels"])

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        return Evaluation(evaluate(model, self.evaluation, self.data, accelerator))


@contextmanager
def _without_regularisation(model: Any) -> Iterator[None]:
    """Leave out what PEFT adds to the model's loss for AdaLoRA: that is meant to be there."""
    with ExitStack() as stack:
        for tuning in getattr(model, "peft_config", {}).values():
            if hasattr(tuning, "orth_reg_weight"):
                stack.callback(patch(tuning, "orth_reg_weight", 0.0))
        yield
