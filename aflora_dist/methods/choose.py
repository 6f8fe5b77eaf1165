"""Which method a configuration asks for, and what all of them are compared with."""

from __future__ import annotations

from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapter.architectures import kind_of
from ..options import Config
from .adalora import AdaLora
from .aflora import AFLoRA
from .base import Method
from .full import Full
from .peft import Peft


def create_method(config: Config) -> Method:
    """The method that `method.name` names; an AFLoRAError says why there is none, or it cannot be trained."""
    kinds: dict[str, Callable[[Config], Method]] = {"aflora": AFLoRA, "full": Full, "adalora": AdaLora}
    return kinds.get(config.method.name, Peft)(config)


def lora_parameters(model: nn.Module, r: int = 8) -> int:
    """Trainable elements of LoRA on the same layers, for comparison (Table 1 uses r = 8).

    The layers are those that are adapted; of a model without adapters, attention and feed-forward of its blocks.
    """
    adapted: list[nn.Module] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        adapted = [module for name, module in model.named_modules() if kind_of(name) is not None]
    return sum(r * sum(_features(module)) for module in adapted)


def _features(module: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, adapted or not; of others, such as an embedding, none."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    return int(getattr(base, "in_features", 0)), int(getattr(base, "out_features", 0))
