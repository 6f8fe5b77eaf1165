"""What adaptive freezing asks of a training engine: gradients, state by name, and a rebuild.

Every engine lays gradients and optimizer state out differently. The classes here hide that: fragments
and states carry the names of the unwrapped model's parameters, which are the same everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..freezing import Fragment


@dataclass
class ParameterState:
    """One trainable parameter with its optimizer state, whole, on this rank.

    Attributes:
        value: The parameter flattened, float32 where the engine keeps float32 master weights.
        moments: The optimizer's element-wise state (Adam's exp_avg, exp_avg_sq), flattened.
        scalars: The optimizer's other state (Adam's step), as the optimizer holds it.
    """

    value: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Receives the gradients of one bucket just before the update; `weights()` gives the values."""

    def __call__(
        self,
        bucket: int,
        gradients: Sequence[Tensor],
        weights: Callable[[], Sequence[Tensor]],
        scale: Tensor | float,
    ) -> None: ...


class Engine(ABC):
    """One training engine, bound to a prepared model and optimizer.

    Args:
        model: The unwrapped model; its `named_parameters()` give the names.

    Attributes:
        kind: "single", "ddp", "zero1", "zero2" or "zero3".
        parameters: Every parameter that the optimizer was given, by name.
    """

    kind: str

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Parameter, str] = {p: n for n, p in model.named_parameters()}
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._handles: list[Callable[[], None]] = []

    # -- where in the step we are ------------------------------------------------------------

    @abstractmethod
    def watch(self, observe: Observer, updated: Callable[[], None]) -> None:
        """Call `observe` once per bucket just before each update, and `updated` just after it.

        Neither is called for a skipped (overflowed) update or between accumulated micro-batches.
        The gradients times the scale are those of the mean loss over the global batch, before
        clipping.
        """

    def unwatch(self) -> None:
        """Take back what `watch` installed."""
        while self._handles:
            self._handles.pop()()

    # -- gradients ---------------------------------------------------------------------------

    @abstractmethod
    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        """Which fragments of the named trainable parameters this rank observes, bucket by bucket.

        Over all ranks every element is in exactly one fragment. Valid until the next rebuild.
        """

    def bucket_devices(self) -> list[torch.device]:
        """Where the gradients of each bucket lie."""
        return [self.device]

    # -- state by name -----------------------------------------------------------------------

    @abstractmethod
    def state(self) -> dict[str, ParameterState]:
        """The state of every trainable parameter, whole, on every rank. A collective."""

    @abstractmethod
    def rebuild(self, state: Mapping[str, ParameterState]) -> None:
        """Go on with exactly the parameters in `state`, from that state. A collective.

        All other parameters stop training: gradient, optimizer state and master weight are
        released. Handles of the user's (model, optimizer, scheduler) stay valid.
        """

    @abstractmethod
    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole current values of parameters, trainable or not, on every rank. A collective."""

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Give parameters that do not train these values (any shape), on every rank. A collective."""
        with torch.no_grad():
            for name, value in values.items():
                parameter = self.parameters[name]
                parameter.copy_(value.view(parameter.shape))

    def settle(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Drop what a resumed process would not have; called after a checkpoint, so that both go on alike."""

    @abstractmethod
    def scaling(self) -> dict[str, Any]:
        """State of the fp16 loss scale, as JSON can hold it; empty without one."""

    @abstractmethod
    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        """Go on with a loss scale that an engine of this kind gave."""

    @abstractmethod
    def moment_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds for trainable parameters, padding excluded."""

    def numel(self, name: str) -> int:
        """Elements of a parameter, whole."""
        return self.parameters[name].numel()

    @property
    @abstractmethod
    def trainable(self) -> list[str]:
        """Names of the parameters that the optimizer updates."""

    @property
    @abstractmethod
    def optimizer(self) -> Optimizer:
        """The torch optimizer whose param groups the user and the scheduler see."""

    # -- collectives -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def sum_over_ranks(self, vector: Tensor) -> Tensor:
        """One all-reduce, in place; free where there is one rank."""
        if self.world_size > 1:
            dist.all_reduce(vector)
        return vector

    def gather(
        self, pieces: Iterable[tuple[Fragment, Tensor]], numels: Mapping[str, int], rows: int
    ) -> dict[str, Tensor]:
        """Whole float32 tensors (rows, numel) by name from the fragments that the ranks hold.

        One all-reduce over the bit patterns: every element has one owner and the others add
        integer zero, so the result is exact to the bit on every rank.
        """
        whole = torch.zeros(rows, sum(numels.values()), dtype=torch.float32, device=self.device)
        views = dict(zip(numels, whole.split(list(numels.values()), dim=1), strict=True))
        for fragment, tensor in pieces:
            views[fragment.name][:, fragment.start : fragment.start + fragment.numel] = tensor
        self.sum_over_ranks(whole.view(torch.int32))
        return views


def split_state(state: Mapping[Any, Any], numel: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state of one tensor as (element-wise, other)."""
    moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.numel() == numel and v.dim() > 0}
    return moments, {k: v for k, v in state.items() if k not in moments}


def release(parameter: nn.Parameter) -> None:
    """Stop a parameter's training: an optimizer looks at .grad, not at requires_grad."""
    parameter.requires_grad_(False)
    parameter.grad = None
