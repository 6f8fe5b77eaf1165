"""The process group as engines use it: vectors are sent from wherever it takes them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import AFLoRAError
from ..processes import rank, world_size


class Collectives(ABC):
    """What an engine asks of the ranks together."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lies."""

    @property
    def world_size(self) -> int:
        return world_size()

    @property
    def rank(self) -> int:
        return rank()

    @property
    def comm_device(self) -> torch.device:
        """Where the process group takes its tensors from."""
        on_cpu = not dist.is_initialized() or "gloo" in str(dist.get_backend())
        return torch.device("cpu") if on_cpu else self.device

    def sum_over_ranks(self, vector: Tensor) -> Tensor:
        """One all-reduce, in place; free where there is one rank."""
        return self._all_reduce(vector, dist.ReduceOp.SUM)

    def max_over_ranks(self, vector: Tensor) -> Tensor:
        """One all-reduce, in place; free where there is one rank."""
        return self._all_reduce(vector, dist.ReduceOp.MAX)

    def _all_reduce(self, vector: Tensor, operation: Any) -> Tensor:
        if self.world_size > 1:
            sent = vector.to(self.comm_device)
            dist.all_reduce(sent, op=operation)
            vector.copy_(sent)
        return vector

    def agree(self, what: str, complaint: str) -> None:
        """Raise an AFLoRAError on every rank unless all hold the same text. One all-reduce of two numbers."""
        digest = int(hashlib.sha256(what.encode()).hexdigest()[:16], 16) >> 2  # 62 bits: int64 holds its negative, too
        largest, negated = self.max_over_ranks(torch.tensor([digest, -digest], dtype=torch.int64)).tolist()
        if largest != -negated:  # the smallest is not the largest
            raise AFLoRAError(f"The ranks {complaint}. Start all of them with the same code, seed and configuration.")
