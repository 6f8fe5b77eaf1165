"""What the training loop asks of a task. Knows no engine and no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .batches import Batch
from .limits import Limits
from .sampler import GlobalBatchSampler


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: The task's metrics, the one that it is known by first.
        samples: What the model said to a few examples, as Markdown; empty where it says nothing to read.
    """

    metrics: dict[str, float]
    samples: str = ""


class Task(Protocol):
    """Something to be fine-tuned on: data, the model's head for it, a loss, and an evaluation.

    Attributes:
        name: What result.json calls it.
        train_examples: How many there are to train on, once they are loaded.
        limits: What the model can take, once it is loaded.
        tokenizer: The model's, once it is loaded.
        labels: Class names by number, once the data are loaded; None where there are no classes.
    """

    name: str
    train_examples: int
    limits: Limits
    tokenizer: Any
    labels: list[str] | None

    def load(self, accelerator: Accelerator, *, weights: bool = True) -> tuple[Any, list[str]]:
        """Load data and pretrained model. A collective.

        Args:
            weights: Without, the model is made on the meta device from its configuration: enough to plan with.

        Returns:
            The model, and its modules that no checkpoint has: they start at random and train whole.

        Raises:
            AFLoRAError: On every rank: one is not there, or cannot be used.
        """

    def metrics(self) -> list[str]:
        """The names of what `evaluate` will measure, once the batches are made."""

    def tokens(self) -> tuple[list[Any], list[Any]]:
        """What is trained on and what is measured with, once the batches are made: datasets, and lists of answers."""

    def batches(self, accelerator: Accelerator) -> tuple[GlobalBatchSampler, DataLoader[Batch]]:
        """Tokenise, and distribute: this rank's training batches, one micro-batch each. A collective.

        Raises:
            AFLoRAError: On every rank: there is less than one batch of examples.
        """

    def rehearse(self, model: nn.Module, accelerator: Accelerator) -> None:
        """Try what the loss relies on, on the prepared model, before time is spent. A collective.

        Raises:
            AFLoRAError: On every rank: it does not hold for this model.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of all that counts in a micro-batch: examples, or tokens."""

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        """Measure the model as it is now. A collective."""
