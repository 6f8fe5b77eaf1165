"""ZeRO-3: every parameter is cut into equal pieces, one per rank; sub-groups of pieces form partitions.

A drop (`Engine.drop` and `ZeroEngine.select`, which call `_replace` here) re-forms the partitions and moves nothing
between ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from ...compat.deepspeed import ZERO3, forget_passes, unpin
from ...compat.patch import patch
from ...freezing import Fragment
from . import device
from .zero import Span, ZeroEngine


class Zero3Engine(ZeroEngine):
    """DeepSpeedZeroOptimizer_Stage3, with optimizer and parameter offload to CPU."""

    interfaces = ZERO3
    sharded = True

    def _group_parameters(self) -> list[tuple[int, list[nn.Parameter]]]:
        positions = self._positions()
        return [(positions[self.zero.sub_group_to_group_id[i]], group) for i, group in enumerate(self.zero.fp16_groups)]

    def _partitions(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def _layouts(self) -> dict[int, list[list[Span]]]:
        spans: list[list[Span]] = []
        for group in self.zero.fp16_groups:
            spans.append([])
            for parameter in group:
                _, at, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = self.rank * length
                numel = min(length, parameter.ds_numel - start)  # the last pieces may be padding
                if numel > 0:
                    spans[-1].append((Fragment(self.names[parameter], start, numel), at))
        return {self.rank: spans}

    def numel(self, name: str) -> int:
        parameter: Any = self.parameters[name]
        return parameter.ds_numel

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        self.zero.grad_partitions_flat_buffer.zero_()

    def _replace(self, dropped: Sequence[Any]) -> None:
        old, offload = self.zero, self.zero.parameter_offload
        if not self.ds.zero_prefetch_bucket_size():
            # Then it insists on what it has recorded to follow, and of what froze no gradient asks for it any more.
            forget_passes(offload)
        # old.destroy() would also take the module hooks that gather parameters; they stay, with the
        # object that owns them, so only the optimizer half is undone and made anew.
        for hook in old._grad_acc_hooks + old._leaf_module_hooks:
            hook.remove()
        old.ipg_buckets.clear()
        unpin(old)
        for parameter in dropped:
            # Its piece is a view of the old group's flat buffer, which would stay alive through it.
            parameter.ds_tensor.data = parameter.ds_tensor.data.clone()
        old.__dict__.clear()  # reference cycles would keep its buffers until the next collection
        with ExitStack() as stack:

            def instead(owner: Any, name: str, value: Any) -> None:
                stack.callback(patch(owner, name, value))

            instead(DeepSpeedZeroOptimizer_Stage3, "initialize_ds_offload", lambda self, **kwargs: offload)
            # DeepSpeed would also collect garbage per flat buffer (0.3 s each; there is none, see above),
            instead(gc, "collect", lambda *args: 0)
            # format the model and its parameters, numbers and all, for a message that it does not print (and
            # nn.EmbeddingBag formats all that it holds, which by now leads back to itself),
            instead(nn.Parameter, "__repr__", object.__repr__)
            instead(nn.Module, "__repr__", object.__repr__)
            # and gather every parameter to put a hook on it, one by one; torch's hooks need no values.
            for name in self.trainable:
                instead(self.parameters[name], "all_gather", lambda *args: None)
                instead(self.parameters[name], "partition", lambda *args: None)
            self.ds.optimizer = self.ds._configure_zero_optimizer(self._visible_groups())

    def synchronise(self, names: Sequence[str]) -> None:
        for index in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        # Small parameters stay whole on every rank: have them gathered again, from the new pieces.
        wanted = set(names)
        whole = [p for p in self.zero.persistent_parameters if self.names[p] in wanted]
        whole = [p for p in whole if p.ds_status == ZeroParamStatus.AVAILABLE]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)
        device.synchronize()  # the next forward gathers on DeepSpeed's own stream, which does not wait for this one

    def end_backward_at(self, module: nn.Module | None) -> None:
        forget_passes(self.zero.parameter_offload)

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        for name in names:  # pieces are taken from rank 0's
            with deepspeed.zero.GatheredParameters([self.parameters[name]], modifier_rank=0):
                if self.rank == 0:
                    parameter = self.parameters[name]
                    parameter.copy_(tensors[name].view(parameter.shape))
        device.synchronize()

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        with deepspeed.zero.GatheredParameters([self.parameters[name] for name in names]):
            return {name: self.parameters[name].detach().clone() for name in names}
