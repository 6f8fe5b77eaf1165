"""The numbers in which a model's weights are held: what was stored, what the engine wants, or a few bits."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import BitsAndBytesConfig

from ..compat.deepspeed import is_sharded
from ..errors import AFLoRAError
from ..extras import require
from ..options import ModelConfig


def storage_dtype(config: ModelConfig, accelerator: Accelerator) -> torch.dtype | None:
    """As numbers of which dtype 4-bit weights are packed where the engine shards them; None: as bytes.

    ZeRO-3 and FSDP2 cast what is floating to the dtype that they compute in, and must find the packed weights in it.
    """
    if config.quantize != "nf4" or not _sharded(accelerator):
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(accelerator.mixed_precision), torch.float32)


def holds_float32(accelerator: Accelerator) -> bool:
    """Whether the engine holds all weights in float32: DeepSpeed has them in the dtype that it computes in."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "no"


def check_weights(config: ModelConfig, accelerator: Accelerator) -> None:
    """Raise AFLoRAError for weights that the engine would hold in another dtype, or would lose the scales of."""
    if config.dtype in ("bfloat16", "float16") and holds_float32(accelerator):
        precision = {"bfloat16": "bf16", "float16": "fp16"}[config.dtype]
        raise AFLoRAError(
            f"model.dtype={config.dtype} does not work with DeepSpeed and --mixed_precision no: it holds all weights "
            f"in what it computes in, float32. Use --mixed_precision {precision}, or --model.dtype float32."
        )
    if config.quantize == "int8" and (sharded := _sharded(accelerator)):
        raise AFLoRAError(
            f"model.quantize=int8 does not work with {sharded}, which loses the scales of the weights that it shards. "
            f"Use model.quantize=nf4, or launch/ddp.yaml, launch/zero1.yaml or launch/zero2.yaml."
        )


def _sharded(accelerator: Accelerator) -> str | None:
    """Which engine shards frozen weights, if one does."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO-3"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else None


@torch.no_grad()
def without_float16(model: Any) -> Any:
    """Weights that happen to be stored in float16 as the same numbers in float32; quantised ones stay as they are.

    transformers takes a checkpoint's dtype where none is named. In float16, gradients are lost without a loss scale;
    bfloat16 has float32's range.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16 and type(tensor) in (nn.Parameter, torch.Tensor) and not is_sharded(tensor):
            tensor.data = tensor.data.float()
    if model.config.dtype == torch.float16:
        model.config.dtype = torch.float32
    return model


def bitsandbytes_config(config: ModelConfig, storage: torch.dtype | None = None) -> Any:
    """bitsandbytes' settings: nf4 as QLoRA has it (double quantisation), or int8."""
    if config.quantize is None:
        return None
    require("quantized", f"model.quantize={config.quantize}")
    if config.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype or "bfloat16"),
        bnb_4bit_quant_storage=storage,
    )


def keep_trainable_on_cpu(model: Any) -> None:
    """bitsandbytes lays 4-bit weights out anew for a CPU's evaluation, and has no gradients for them any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
