"""ZeRO-1 and ZeRO-2: per param group one flat buffer, cut at arbitrary places into equal partitions.

A drop shortens the buffer and moves the cuts, so that some intervals change their rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...compat.deepspeed import ZERO12, offsets
from ...freezing import Fragment
from .zero import Span, ZeroEngine


class Zero12Engine(ZeroEngine):
    """DeepSpeedZeroOptimizer (stages 1 and 2), optimizer offload to CPU included."""

    interfaces = ZERO12

    def _group_parameters(self) -> list[tuple[int, list[nn.Parameter]]]:
        return list(zip(self._positions(), self.zero.bit16_groups, strict=True))

    def _partitions(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def _layouts(self) -> dict[int, list[list[Span]]]:
        zero = self.zero
        sizes = map(int, zero.partition_size)  # floats in DeepSpeed 0.19.0
        groups = list(zip(zero.round_robin_bit16_groups, offsets(zero), sizes, strict=True))
        return {rank: [self._cut(*group, rank) for group in groups] for rank in range(self.world_size)}

    def _cut(self, parameters: Sequence[nn.Parameter], starts: Sequence[int], size: int, rank: int) -> list[Span]:
        """What of a group's buffer lies in the partition of one rank."""
        low, spans = rank * size, []
        for parameter, offset in zip(parameters, starts, strict=True):
            start, stop = max(offset, low), min(offset + parameter.numel(), low + size)
            if start < stop:
                spans.append((Fragment(self.names[parameter], start - offset, stop - start), start - low))
        return spans

    def _norm(self, scale: float) -> Tensor:
        return super()._norm(scale) * self._loss_scale / scale  # as the gradients were scaled

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        for buffer in getattr(self.zero, "accumulated_grads_in_cpu", {}).values():  # under optimizer offload
            buffer.zero_()

    def _replace(self, dropped: Sequence[nn.Parameter]) -> None:
        old = self.zero
        old.destroy()
        for parameter in dropped:
            # Its data is a view of the old group's flat buffer, which would stay alive through it.
            parameter.data = parameter.data.clone()
            for name in ("_hp_mapping", "_zero_optimizer", "grad_accum"):
                if hasattr(parameter, name):
                    setattr(parameter, name, None)
        old.__dict__.clear()  # reference cycles would keep its buffers until the next collection
        self.ds.optimizer = self.ds._configure_zero_optimizer(self._visible_groups())

    def synchronise(self, names: Sequence[str]) -> None:
        self.zero.update_lp_params()
