"""`aflora to-lora`: an adapter as PEFT's LoRA, from its file alone. Needs neither the model nor a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..adapter import label_mapping, write_lora
from ..store.rundir import LORA
from .card import write_card
from .source import Source, new_folder, read_adapter

_HEADS = {"classifier", "score"}  # what vLLM takes of modules_to_save


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
        paths = {layer: source.path(layer) for layer in source.layers}
        labels = {} if source.labels is None else {"auto_mapping": label_mapping(source.labels)}
        whole = {key: source.tensor(key) for key in source.whole.values()}
        write_lora(folder, {**source.config, **labels}, paths, whole)
        for path in source.tokenizer:
            shutil.copyfile(path, folder / path.name)
        said = _refused_by_servers(source)
        write_card(folder, source, "to-lora", run, out, said)
    return source.problems + said


def leave_stock(run: Path) -> None:
    """Leave lora/ in a finished run's directory, for whoever does not know this package; nothing if it is there.

    An AFLoRA adapter is folded; one of a method of PEFT's own is copied as it is. Full fine-tuning has no adapter.

    Raises:
        AFLoRAError: It cannot be written.
    """
    out = run / LORA
    if (out.exists() and any(out.iterdir())) or not (run / "adapter" / "adapter_config.json").is_file():
        return
    source = read_adapter(run, any_method=True)
    if source.layers:
        to_lora(run, out)
        return
    with new_folder(out, "The adapter") as folder:
        shutil.copytree(source.folder, folder, dirs_exist_ok=True)
        write_card(folder, source, "lora", run, out, [])


def _refused_by_servers(source: Source) -> list[str]:
    said = []
    whole, r = sorted(source.whole), source.config["r"]
    listed = f"({', '.join(whole[:3])}{', ...' if len(whole) > 3 else ''})"
    if whole and source.config["task_type"] == "SEQ_CLS" and all(_HEADS & {*name.split(".")} for name in whole):
        said.append(
            f"It holds the classifier's head, too {listed}. PEFT and transformers load it; vLLM does since August 2026 "
            f"(its pull request 53555), and rejects it before (modules_to_save): serve the model that `aflora merge` "
            f"writes there."
        )
    elif whole:
        said.append(
            f"It also holds weights that train whole {listed}. PEFT and transformers load them; vLLM rejects such an "
            f"adapter (of modules_to_save it takes a classifier's head alone, and no trained biases): serve the model "
            f"that `aflora merge` writes there."
        )
    if r > 16:
        said.append(f"vLLM's limit is rank 16 unless it is started with a --max-lora-rank of at least {r}.")
    return said
