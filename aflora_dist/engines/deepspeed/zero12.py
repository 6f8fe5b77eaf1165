"""ZeRO-1 and ZeRO-2: per param group one flat buffer, cut at arbitrary places into equal partitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...freezing import Fragment
from ..base import ParameterState
from .zero import ZeroEngine


class Zero12Engine(ZeroEngine):
    """DeepSpeedZeroOptimizer (stages 1 and 2), optimizer offload to CPU included."""

    def _group_parameters(self) -> list[tuple[int, list[nn.Parameter]]]:
        return list(zip(self._positions(), self.zero.bit16_groups, strict=True))

    def _partitions(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def _layout(self) -> list[list[tuple[Fragment, int]]]:
        spans: list[list[tuple[Fragment, int]]] = []
        for group in self.zero.bit16_groups:
            spans.append([])
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                    spans[-1].append((Fragment(self.names[parameter], inside.start, inside.numel), flat.start))
        return spans

    def _combined_scale(self) -> Tensor | float:
        scale = float(self.zero.loss_scale)
        if not self.zero.clip_grad:
            return scale
        norm = torch.as_tensor(self.zero._global_grad_norm) * self._loss_scale  # as the gradients were scaled
        return ((norm / scale + 1e-6) / self.zero.clip_grad).clamp(min=1.0) * scale

    def _replace(self, dropped: Sequence[nn.Parameter]) -> None:
        old = self.zero
        kept = {
            name: getattr(old, name) for name in ("loss_scaler", "dynamic_loss_scale", "overflow", "_global_grad_norm")
        }
        old.destroy()
        for parameter in dropped:
            # Its data is a view of the old group's flat buffer, which would stay alive through it.
            parameter.data = parameter.data.clone()
            for name in ("_hp_mapping", "_zero_optimizer", "grad_accum"):
                if hasattr(parameter, name):
                    setattr(parameter, name, None)
        old.__dict__.clear()  # reference cycles would keep its buffers until the next collection
        self.ds.optimizer = self.ds._configure_zero_optimizer(self._visible_groups())
        for name, value in kept.items():
            setattr(self.zero, name, value)

    def _publish(self, state: Mapping[str, ParameterState]) -> None:
        self.zero.update_lp_params()

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.parameters[name].detach() for name in names}
