"""FSDP2: a rank holds its rows of every parameter, and observes them; of several replicas (HSDP) the first observes.

What is left out of the sharding (FSDP's `ignored_modules`: tensors too small to be worth it, as an adapter's) is on
every rank. FSDP2 does not look after it: here its gradients are averaged over the ranks, as DDP would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..compat.torch import after_backward
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
        self._replicated = [p for p in self.parameters.values() if p.requires_grad and not isinstance(p, DTensor)]
        self._queued = False
        self._last: FSDPModule | None = None  # where backward ends
        for parameter in self._replicated:  # as DDP: however they were drawn
            dist.broadcast(parameter.detach(), 0)

    def watch(self, done: Callable[[bool], None]) -> None:
        super().watch(done)
        arrived = weakref.WeakMethod(self._arrived)  # autograd holds hooks where no garbage collector looks

        def hook(parameter: Tensor) -> None:
            if (method := arrived()) is not None:
                method()

        for parameter in self._replicated:
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook).remove)

    def _arrived(self) -> None:
        if not self._queued and self.accelerator.sync_gradients:
            self._queued = True
            after_backward(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """The gradients of what is replicated become the means over the ranks, in one message for each dtype."""
        self._queued = False
        trained = [p for p in self._replicated if p.requires_grad]
        for dtype in dict.fromkeys(p.dtype for p in trained):
            those = [p for p in trained if p.dtype == dtype]
            flat = torch.cat([self._gradient(p).reshape(-1) for p in those])
            dist.all_reduce(flat)
            flat /= self.world_size
            for parameter, mean in zip(those, flat.split([p.numel() for p in those]), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view_as(parameter))
                elif mean.any():  # used on another rank
                    parameter.grad = mean.view_as(parameter).clone()

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

    def end_backward_at(self, module: nn.Module | None) -> None:
        if self._last is not None:
            self._last.set_modules_to_backward_prefetch([])
        self._last = module if isinstance(module, FSDPModule) else None
        if self._last is not None:  # it would fetch the module before it, which needs nothing any more
            self._last.set_modules_to_backward_prefetch([self._last])

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
