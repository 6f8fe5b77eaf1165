"""How fast a training is for its hardware: FLOPs of a token, and the share of the devices' peak (MFU)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..compat.deepspeed import whole_shape
from .peaks import peak_flops

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def flops_per_token(model: nn.Module, is_head: Callable[[str], bool]) -> int | None:
    """FLOPs that a training step needs for a token that is not padding: 4 W_frozen + 6 W_trained.

    W counts the elements of weight matrices that multiply each token. Each takes a multiplication and an addition in
    the forward pass and again for the gradient of its input: 4. One that trains takes 2 more for its own gradient.

    Not counted are attention's products of tokens with tokens, which grow with the square of the length L: 12 L d
    beside the 48 d^2 of a usual frozen block of width d, so L / 4d, 8% with 256 tokens and d = 768 (half of that where
    tokens see only those before them). Nor are what is recomputed with gradient checkpointing, the vectors, norms and
    lookups, and the head of a classifier, which sees an example once. What freezes later counts as training, and the
    first layer as if its input needed a gradient: both are small. So the share of the peak is mostly a little too low.

    Args:
        model: With its adapters, before an engine has it.
        is_head: See `Method.is_head`.

    Returns:
        None where it is not known which weights a token meets: mixtures of experts.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", config)
    if any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS):
        return None
    flops = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for own, parameter in module.named_parameters(prefix=name, recurse=False):
            if not is_head(own):
                flops += (6 if parameter.requires_grad else 4) * _elements(module, own, parameter)
    return flops


def _elements(module: nn.Module, name: str, parameter: Tensor) -> int:
    """Of a matrix, also where it is sharded (ZeRO-3), or packed by a quantization; 0 for what is none."""
    rows, columns = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
    if name.endswith(".weight") and isinstance(rows, int) and isinstance(columns, int) and rows and columns:
        return rows * columns
    shape = whole_shape(parameter)
    return math.prod(shape) if len(shape) == 2 else 0


def peak(accelerator: Accelerator, model: nn.Module) -> float | None:
    """FLOP/s of all devices at most, in the numbers that the training multiplies; None where it is not known."""
    if accelerator.device.type != "cuda":
        return None
    precision = str(accelerator.mixed_precision)
    if precision == "no":
        precision = _held_in(model)
    one = peak_flops(torch.cuda.get_device_name(accelerator.device), precision)
    return None if one is None else one * accelerator.num_processes


def _held_in(model: nn.Module) -> str:
    """What the model's own weights are, as peaks.py calls it."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    dtype = dtypes[0] if dtypes else torch.float32
    if dtype == torch.float32:
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "unknown")
