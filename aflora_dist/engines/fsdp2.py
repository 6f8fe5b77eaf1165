"""FSDP2: a rank holds its rows of every parameter, and observes them; of several replicas (HSDP) the first observes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..errors import UnsupportedEngineError
from ..freezing import Fragment
from ..processes import rank
from .native import NativeEngine


class Fsdp2Engine(NativeEngine):
    """accelerate's FSDP with `fsdp_version: 2`, CPU offload and HSDP included."""

    kind = "fsdp2"
    sharded = True

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        super().__init__(accelerator, model, optimizer)
        self._places = {p: _place(name, p) for name, p in self.parameters.items()}

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _offset(self, parameter: nn.Parameter) -> int:
        return self._places[parameter][0]

    def _holds_first_copy(self, parameter: nn.Parameter) -> bool:
        return self._places[parameter][1]

    def _fragment(self, name: str) -> Fragment | None:
        parameter = self.parameters[name]
        numel = self._local(parameter.detach()).numel()
        return Fragment(name, self._offset(parameter), numel) if numel and self._holds_first_copy(parameter) else None

    def synchronise(self, names: Sequence[str]) -> None:
        """What a forward pass without a backward pass (an evaluation) has left gathered is of before."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def assign(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        super().assign(tensors, names)
        self.synchronise(names)

    @torch.no_grad()
    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            parameter = self.parameters[name].detach()
            found[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()
        return found


def _place(name: str, parameter: nn.Parameter) -> tuple[int, bool]:
    """The first element of this rank's part, and whether this is the first rank that holds the part."""
    if not isinstance(parameter, DTensor):  # left out of the sharding: the same on every rank
        return 0, rank() == 0
    mesh, first, start = parameter.device_mesh, True, 0
    for dimension, placement in enumerate(parameter.placements):
        place, size = mesh.get_local_rank(dimension), mesh.size(dimension)
        if placement.is_replicate():
            first = first and place == 0
        elif placement == Shard(0) and start == 0:
            rows = parameter.shape[0]
            start = min(place * -(-rows // size), rows) * (parameter.numel() // max(rows, 1))
        else:
            raise UnsupportedEngineError(
                f"{name} is laid out as {parameter.placements}: freezing is for data parallelism, where FSDP2 shards "
                f"rows over one dimension of the mesh. Leave tensor, context and expert parallelism out."
            )
    return start, first
