"""An AFLoRA adapter as a plain LoRA adapter: the same function, servable by anything that serves LoRA.

With alpha = r, LoRA computes W0 + B' A'; A' = A and B' = diag(s_b) B diag(s_d) make that Eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AFLoRAError, ExistsError
from ..names import in_peft, is_adapter, named_modules, of_base
from .config import AFLoRAConfig
from .layer import AFLoRALayer
from .path import lora_up


def write_lora(
    folder: Path,
    config: Mapping[str, Any],
    paths: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]],
    whole: Mapping[str, Tensor],
) -> None:
    """Write PEFT's folder of a LoRA adapter that computes what an AFLoRA adapter does.

    Args:
        folder: Is there.
        config: Of the AFLoRA adapter, as its adapter_config.json has it.
        paths: A, B, s_d and s_b by the name of their layer.
        whole: What it holds besides, by its names there.
    """
    # A model that transformers' add_adapter has adapted has no names of a PeftModel, and PEFT reads those only.
    tensors = {in_peft(key): tensor for key, tensor in whole.items()}
    for layer, (A, B, s_d, s_b) in ((in_peft(layer), path) for layer, path in paths.items()):
        tensors[f"{layer}.lora_A.weight"] = A.detach().clone().contiguous()
        tensors[f"{layer}.lora_B.weight"] = lora_up(B, s_d, s_b)
    bias = config.get("bias", "none")
    LoraConfig(
        r=config["r"],
        lora_alpha=config["r"],
        target_modules=[of_base(layer) for layer in paths],
        modules_to_save=config.get("modules_to_save"),
        bias="lora_only" if bias == "aflora_only" else bias,
        task_type=config.get("task_type"),
        auto_mapping=config.get("auto_mapping"),
        base_model_name_or_path=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def save_as_lora(model: PeftModel, directory: str | Path, adapter_name: str = "default") -> Path:
    """Write the adapter as PEFT's LoRA (adapter_config.json, adapter_model.safetensors).

    Args:
        model: Holds the AFLoRA adapter; it is not changed. Not for a model partitioned by ZeRO-3:
            load the saved adapter in one process first.
        directory: Created if need be. Must not hold an adapter yet.

    Raises:
        AFLoRAError: `adapter_name` is not an AFLoRA adapter of the model.
        ExistsError: The directory already holds an adapter.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, AFLoRAConfig):
        raise AFLoRAError(
            f"{adapter_name!r} is not an AFLoRA adapter of this model; it has {sorted(model.peft_config)}."
        )
    directory = Path(directory)
    if (directory / "adapter_config.json").exists():
        raise ExistsError(f"{directory} already holds an adapter; choose another folder.")
    layers = {
        name: layer.path(adapter_name)
        for name, layer in named_modules(model).items()
        if isinstance(layer, AFLoRALayer) and adapter_name in layer.aflora
    }
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    directory.mkdir(parents=True, exist_ok=True)
    write_lora(
        directory,
        config.to_dict(),
        {name: (path.A, path.B, path.s_d, path.s_b) for name, path in layers.items()},
        {key: value.detach().clone().contiguous() for key, value in saved.items() if not is_adapter(key)},
    )
    return directory
