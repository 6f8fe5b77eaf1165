"""`aflora to-lora`: an adapter as PEFT's LoRA, from its file alone. Needs neither the model nor a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..adapter import lora_config, lora_up
from ..names import of_base
from .card import write_card
from .source import new_folder, read_adapter


def to_lora(run: Path, out: Path) -> list[str]:
    """Write the adapter as a LoRA adapter of the same function, layer by layer.

    Args:
        run: A run's directory, or an adapter's folder.
        out: Does not exist yet, or is empty.

    Returns:
        What servers will not take of it, a sentence each.

    Raises:
        AFLoRAError: There is no AFLoRA adapter, or `out` holds something.
    """
    source = read_adapter(run)
    with new_folder(out, "The LoRA adapter") as folder:
        tensors: dict[str, Tensor] = {}
        for layer in source.layers:
            A, B, s_d, s_b = source.path(layer)
            tensors[f"{layer}.lora_A.weight"] = A
            tensors[f"{layer}.lora_B.weight"] = lora_up(B, s_d, s_b)
        tensors |= {key: source.tensor(key) for key in source.whole.values()}
        lora_config(source.config, [of_base(layer) for layer in source.layers]).save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        for path in source.tokenizer:
            shutil.copyfile(path, folder / path.name)
        said = _refused_by_servers(sorted(source.whole), source.config["r"])
        write_card(folder, source, "to-lora", run, out, said)
    return source.problems + said


def _refused_by_servers(whole: list[str], r: int) -> list[str]:
    said = []
    if whole:
        said.append(
            f"It also holds weights that train whole ({', '.join(whole[:3])}{', ...' if len(whole) > 3 else ''}). PEFT "
            f"and transformers load them; vLLM rejects such an adapter (modules_to_save, trained biases): serve the "
            f"model that `aflora merge` writes there."
        )
    if r > 16:
        said.append(f"vLLM's limit is rank 16 unless it is started with a --max-lora-rank of at least {r}.")
    return said
