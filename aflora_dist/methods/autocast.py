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
    """Forward hook of one layer: gives its output the dtype that autocast computes in.

    A layer whose output has it already in training loses the hook: nobody shall be slowed down by what others need.
    """

    handle: RemovableHandle

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        device = output.device.type
        if torch.is_autocast_enabled(device) and output.dtype != torch.get_autocast_dtype(device):
            return output.to(torch.get_autocast_dtype(device))
        if module.training and not torch.compiler.is_compiling():
            self.handle.remove()
        return None


def match_autocast(model: nn.Module) -> None:
    """Have the adapted linear layers of a PEFT model return what autocast would.

    Norms and embeddings stay float32 under autocast, adapted or not, and quantised layers keep their input's dtype.
    """
    for module in model.modules():
        # Their own type: bitsandbytes quantises in subclasses of nn.Linear.
        if isinstance(module, BaseTunerLayer) and type(module.get_base_layer()) in (nn.Linear, Conv1D):
            hook = OutputCast()
            hook.handle = module.register_forward_hook(hook)
