"""Float32 values for what trains, whatever the model around it is held in. One place for every method and engine.

A checkpoint in half precision brings its dtype along, and an update of Adam's is lost in bfloat16 and not a number in
float16. DeepSpeed and FSDP2 cast for computing, and keep what trains in float32 beside; in one process and with DDP the
parameter itself is what is updated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat.deepspeed import is_sharded
from ..errors import UnsupportedEngineError
from ..names import named_modules, named_parameters

_HALF = (torch.float16, torch.bfloat16)


@torch.no_grad()
def widen(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters in half precision float32 values, and have their modules fit in between those in half precision.

    Outside of autocast such a module is then given float32, and gives on what it gave before, unless it comes after the
    model's body: a head's logits stay float32. Parameters keep their identity. Where `from_pretrained` sharded the
    model for ZeRO-3 nothing changes: DeepSpeed wants it in one dtype, and keeps float32 values beside.

    Args:
        model: What transformers made, not PEFT's model around it.
    """
    half = [p for p in model.parameters() if p.dtype in _HALF]
    chosen = {id(p): p.dtype for p in parameters if p.dtype in _HALF}
    if any(is_sharded(p) for p in half):
        return
    for parameter in half:
        if id(parameter) in chosen:
            parameter.data = parameter.data.float()
    if len(chosen) == len(half):
        return
    body = {*(model.base_model if isinstance(model, PreTrainedModel) else model).modules()}
    for module in model.modules():
        if dtypes := [chosen[id(p)] for p in module.parameters(recurse=False) if id(p) in chosen]:
            module.register_forward_pre_hook(_take, with_kwargs=True)
            if module in body:
                module.register_forward_hook(_Give(dtypes[0]))


def _take(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A module's input in the dtype of its parameters, where autocast does not see to it."""
    dtype = next(module.parameters(recurse=False)).dtype

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and not torch.is_autocast_enabled(value.device.type) else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


class _Give:
    """Forward hook: a float32 output in the dtype that the module was loaded in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        wide = isinstance(output, Tensor) and output.dtype == torch.float32
        return output.to(self.dtype) if wide and not torch.is_autocast_enabled(output.device.type) else output


def check_precision(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse, with an UnsupportedEngineError, what could only fail later, with a complaint about something else."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # which casts all of it
        return
    how = "(from_pretrained(..., dtype=...); in aflora train model.dtype)"
    for name, parameter in named_parameters(model).items():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise UnsupportedEngineError(
                f"{name} would train in float16, in which an optimizer's numbers are lost or infinite. Load the model "
                f"with dtype=torch.float32, or torch.bfloat16 {how}, or name what trains beside the adapter in "
                f"modules_to_save, which AFLoRA holds in float32."
            )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        for name, module in named_modules(model).items():
            if isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dtype == torch.float16:
                raise UnsupportedEngineError(
                    f"{name} is held in float16, and on a CPU torch has no LayerNorm for that under bf16 autocast. "
                    f"Load the model with dtype=torch.bfloat16 or torch.float32 {how}, or use --mixed_precision no."
                )
    if accelerator.mixed_precision == "no":
        for name, module in named_modules(model).items():
            own = list(module.named_parameters(recurse=False))
            trained = [n for n, p in own if p.requires_grad and p.dtype == torch.float32]
            still = [p.dtype for _, p in own if not p.requires_grad and p.dtype in _HALF]
            if trained and still:  # a bias
                raise UnsupportedEngineError(
                    f"{name}.{trained[0]} trains in float32 beside a weight in {str(still[0])[6:]}: one layer cannot "
                    f"compute with both. Use --mixed_precision bf16, or load the model with dtype=torch.float32 {how}."
                )


def beyond_float16(model: nn.Module) -> str:
    """What else than a learning rate makes a loss infinite; empty for a model that has no float16."""
    if all(parameter.dtype != torch.float16 for parameter in model.parameters()):
        return ""
    return (
        "The model is held in float16, in which numbers above 65,504 are infinite: load it with dtype=torch.bfloat16 "
        "or torch.float32 (model.dtype). If that is not it: "
    )
