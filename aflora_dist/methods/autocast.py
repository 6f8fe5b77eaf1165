"""Adapted layers that return the dtype that autocast gives the layers around them.

PEFT's VeRA, MiSS, RandLoRA and others return float32 from a float32 input under autocast, where a plain linear layer
returns bfloat16. DeBERTa-v2 then fails in its attention mask, which it fills with the lowest number of another dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


class OutputCast:
    """Forward hook: gives an output the dtype that autocast computes in.

    Attributes:
        used: An output had to be cast.
    """

    def __init__(self) -> None:
        self.used = False
        self.handles: list[RemovableHandle] = []

    def remove_if_unused(self) -> None:
        """After a step: nobody shall be slowed down by what only others need."""
        if not self.used:
            for handle in self.handles:
                handle.remove()

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        device = output.device.type
        if not torch.is_autocast_enabled(device) or output.dtype == torch.get_autocast_dtype(device):
            return None
        self.used = True
        return output.to(torch.get_autocast_dtype(device))


def match_autocast(model: nn.Module) -> OutputCast:
    """Have the adapted linear layers of a PEFT model return what autocast would; the hook says if that was needed.

    Norms and embeddings stay float32 under autocast, adapted or not, and quantised layers keep their input's dtype.
    """
    hook = OutputCast()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and _is_cast(module.get_base_layer()):
            hook.handles.append(module.register_forward_hook(hook))
    return hook


def _is_cast(base: nn.Module) -> bool:
    """Whether autocast decides in what a layer's output is."""
    return type(base) in (nn.Linear, Conv1D)  # not a subclass that bitsandbytes quantises
