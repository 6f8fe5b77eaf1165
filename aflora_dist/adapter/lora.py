"""An AFLoRA adapter as a plain LoRA adapter: the same function, servable by anything that serves LoRA.

With alpha = r, LoRA computes W0 + B' A'; A' = A and B' = diag(s_b) B diag(s_d) make that Eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..names import is_adapter, named_modules, of_base
from .config import AFLoRAConfig
from .layer import AFLoRALayer
from .path import lora_up


def lora_config(config: Mapping[str, Any], layers: Sequence[str]) -> LoraConfig:
    """The LoRA configuration for what an adapter_config.json of ours says, on these layers, by full name."""
    bias = config.get("bias", "none")
    return LoraConfig(
        r=config["r"],
        lora_alpha=config["r"],
        target_modules=list(layers),
        modules_to_save=config.get("modules_to_save"),
        bias="lora_only" if bias == "aflora_only" else bias,
        task_type=config.get("task_type"),
        base_model_name_or_path=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        inference_mode=True,
    )


@torch.no_grad()
def save_as_lora(model: PeftModel, directory: str | Path, adapter_name: str = "default") -> Path:
    """Write the adapter as PEFT's LoRA (adapter_config.json, adapter_model.safetensors).

    Args:
        model: Holds the AFLoRA adapter; it is not changed. Not for a model partitioned by ZeRO-3:
            load the saved adapter in one process first.
        directory: Created if need be. Must not hold an adapter yet.

    Raises:
        ValueError: `adapter_name` is not an AFLoRA adapter of the model.
        FileExistsError: The directory already holds an adapter.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, AFLoRAConfig):
        raise ValueError(
            f"{adapter_name!r} is not an AFLoRA adapter of this model; it has {sorted(model.peft_config)}."
        )
    directory = Path(directory)
    if (directory / "adapter_config.json").exists():
        raise FileExistsError(f"{directory} already holds an adapter; choose another folder.")
    tensors: dict[str, Tensor] = {}
    targets = []
    for name, layer in named_modules(model).items():
        if isinstance(layer, AFLoRALayer) and adapter_name in layer.aflora:
            path = layer.path(adapter_name)
            tensors[f"{name}.lora_A.weight"] = path.A.detach().clone().contiguous()
            tensors[f"{name}.lora_B.weight"] = lora_up(path.B, path.s_d, path.s_b)
            targets.append(of_base(name))
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors |= {key: value.detach().clone().contiguous() for key, value in saved.items() if not is_adapter(key)}
    directory.mkdir(parents=True, exist_ok=True)
    lora_config(config.to_dict(), targets).save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
