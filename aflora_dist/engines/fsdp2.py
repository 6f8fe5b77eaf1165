"""FSDP2: a rank holds its rows of every parameter, and observes them; of several replicas (HSDP) the first observes.

What is left out of the sharding (FSDP's `ignored_modules`: tensors too small to be worth it, as an adapter's) is on
every rank. FSDP2 does not look after it: here its gradients are averaged over the ranks, as DDP would.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..compat.torch import after_backward, backward_pass, weakly
from ..errors import UnsupportedEngineError
from ..freezing import Fragment
from ..processes import rank
from .native import NativeEngine
from .optimizers import check_updates


class _Averaging:
    """Averages gradients over the ranks as long as the model lives, whoever watches it: it is how the model trains.

    Args:
        trained: What is left out of the sharding; a message for each dtype at the end of a backward pass.
    """

    def __init__(self, accelerator: Accelerator, trained: Sequence[nn.Parameter]) -> None:
        self._accelerator, self._trained = weakref.ref(accelerator), trained  # the accelerator holds the model
        self._pass = -1
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(weakly(self._arrived))

    def _arrived(self) -> None:
        accelerator = self._accelerator()
        # Not a flag: a pass that ends with an error forgets what was queued.
        if self._pass != backward_pass() and accelerator is not None and accelerator.sync_gradients:
            self._pass = backward_pass()
            after_backward(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        trained = [p for p in self._trained if p.requires_grad]
        for dtype in dict.fromkeys(p.dtype for p in trained):
            those = [p for p in trained if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in those])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for parameter, mean in zip(those, flat.split([p.numel() for p in those]), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view_as(parameter))
                elif mean.any():  # used on another rank
                    parameter.grad = mean.view_as(parameter).clone()


# A later engine of a model takes the place of an earlier one, whose hooks then do nothing.
_AVERAGING: WeakKeyDictionary[nn.Module, _Averaging] = WeakKeyDictionary()


class Fsdp2Engine(NativeEngine):
    """accelerate's FSDP with `fsdp_version: 2`, CPU offload and HSDP included."""

    kind = "fsdp2"
    sharded = True

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        super().__init__(accelerator, model, optimizer)
        self._places = {p: _place(name, p) for name, p in self.parameters.items()}
        self._last: FSDPModule | None = None  # where backward ends
        if sharded := [p for g in self.optimizer.param_groups for p in g["params"] if isinstance(p, DTensor)]:
            smallest = min(sharded, key=lambda p: p.numel())
            check_updates(self.optimizer, smallest.detach(), "DTensors, in which FSDP2 holds what it shards")
        whole = [p for p in self.parameters.values() if not isinstance(p, DTensor)]
        for parameter in whole:  # as DDP, what never trains too: however they were drawn
            if parameter.is_floating_point():  # what is packed into integers is the base model's, and read from a file
                dist.broadcast(parameter.detach(), 0)
        if trained := [p for p in whole if p.requires_grad]:
            self._check_mixed(accelerator)
            _AVERAGING[self.model] = _Averaging(accelerator, trained)

    def _check_mixed(self, accelerator: Accelerator) -> None:
        """No kernel over many tensors at once takes both kinds; one tensor after the other, all do."""
        if accelerator.scaler is not None:
            raise UnsupportedEngineError(
                "Some of what trains is left out of FSDP2's sharding (ignored_modules), and fp16's scaler takes one "
                "kind only: use --mixed_precision bf16, or shard everything."
            )
        for group in self.optimizer.param_groups:
            if len({isinstance(p, DTensor) for p in group["params"]}) > 1:
                group.update({kernel: False for kernel in ("fused", "foreach") if kernel in group})

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
        held = ((name, self.parameters[name].detach()) for name in names)
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in held}


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
