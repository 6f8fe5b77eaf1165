"""`aflora merge`: an adapter merged into its model's weights, one tensor at a time, in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..adapter.lora import lora_up
from ..errors import AFLoRAError
from ..names import of_base
from ..tasks.glue import TASKS
from .base import Shards, Skeleton, beside_weights, find_base, load_config
from .card import write_card
from .source import Source, new_folder, read


def merge(run: Path, out: Path, base: str | None = None, shard_bytes: int = 2 * 10**9) -> list[str]:
    """Write the model with the adapter in its weights. Holds `shard_bytes` of it at a time, or one tensor.

    The sum is taken in float32 and stored in the weight's own dtype.

    Args:
        run: A run's directory, or an adapter's folder.
        out: Does not exist yet, or is empty.
        base: Another folder or hub id of the model than the adapter's configuration names.
        shard_bytes: Largest size of a file of weights, unless one tensor is larger.

    Returns:
        What to mind, a sentence each.

    Raises:
        AFLoRAError: It cannot be merged exactly; the message says why.
    """
    source = read(run)
    name = base or source.config.get("base_model_name_or_path")
    if not name:
        raise AFLoRAError(f"{source.folder} does not name its base model: name it with --base.")
    with new_folder(out, "The merged model") as folder:  # looks at `out` before anything is fetched
        base_folder = find_base(name, None if base else source.config.get("revision"))
        merged = Merged(source, base_folder)
        write_shards(merged.tensors(), folder, shard_bytes)
        merged.config.save_pretrained(folder)
        for path in beside_weights(base_folder):
            shutil.copyfile(path, folder / path.name)
        said = merged.notes()
        write_card(folder, source, "merge", run, out, said)
    return said


class Merged:
    """The merged model's tensors and configuration.

    Attributes:
        config: The model's own, with the class, labels and untying that the merged weights need.

    Raises:
        AFLoRAError: A tensor of the adapter has no place in the checkpoint, or the base is quantised.
    """

    def __init__(self, source: Source, base: Path) -> None:
        self.source, self.shards = source, Shards(base)
        trust = bool(source.run and source.run["model"].get("trust_remote_code"))
        self.config = load_config(base, trust)
        self._set_labels(base, trust)
        skeleton = Skeleton(self.config, source.config.get("task_type"), trust)
        self.modules = dict(skeleton.model.named_modules())
        self.stored = skeleton.stored(self.shards)
        self.layers = {f"{of_base(layer)}.weight": layer for layer in source.layers}
        # Where a tied weight is stored under another of its names, it is read there.
        self.aliases = {name: group for group in skeleton.tied for name in group}
        self._check_places(skeleton)
        self.untied = self._untie(skeleton, trust)
        self.config.architectures = [type(skeleton.model).__name__]

    def _set_labels(self, base: Path, trust: bool) -> None:
        """What a classifier's configuration has, as the training had it."""
        if (kind := self.source.config.get("task_type")) not in ("SEQ_CLS", "TOKEN_CLS"):
            return
        sizes = [tensor.shape for key in self.source.whole.values() if (tensor := self.source.tensors[key]).dim() == 2]
        if sizes:
            self.config.num_labels = min(size[0] for size in sizes)  # the head's last layer, as no other does, narrows
        if kind != "SEQ_CLS":
            return
        task = TASKS.get(self.source.run["data"]["task"]) if self.source.run else None
        if task is not None and task.labels is not None:
            self.config.id2label = dict(enumerate(task.labels))
            self.config.label2id = {label: i for i, label in enumerate(task.labels)}
        self.config.problem_type = "regression" if self.config.num_labels == 1 else "single_label_classification"
        if getattr(self.config, "pad_token_id", None) is None:  # GPT-like classifiers look for the last token
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust)
            padding = tokenizer.pad_token_id
            self.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding

    def _check_places(self, skeleton: Skeleton) -> None:
        for weight in self.layers:
            if self._key(weight) is None:
                raise AFLoRAError(
                    f"{weight} is adapted, but the checkpoint of the base model holds no such tensor: it is stored in "
                    f"another form and converted when it is loaded. Load the model, save it with save_pretrained(..., "
                    f"save_original_format=False), and name that folder with --base; or serve the adapter with `aflora "
                    f"to-lora`."
                )
        for name, key in self.source.whole.items():
            if name not in skeleton.names:
                kind = "trained bias" if name.endswith("bias") else "tensor that trains whole"
                raise AFLoRAError(
                    f"The adapter holds the {kind} {key}, which has no place in {type(skeleton.model).__name__}. Is "
                    f"this the base model that it was trained on? Load both with PEFT and call merge_and_unload."
                )
            there, here = skeleton.shapes.get(name), self.source.tensors[key].shape
            if there is not None and there != here:
                raise AFLoRAError(
                    f"{name} is {tuple(there)} in {type(skeleton.model).__name__} and {tuple(here)} in the adapter, "
                    f"which replaces it: the model was changed before it was trained (resized embeddings?). Save the "
                    f"changed model, and name its folder with --base."
                )

    def _key(self, name: str) -> str | None:
        """Where the checkpoint stores this parameter."""
        return next((self.stored[n] for n in [name, *self.aliases.get(name, [])] if n in self.stored), None)

    def _untie(self, skeleton: Skeleton, trust: bool) -> set[str]:
        """Parameters to be stored under each of their names, for they are no longer one and the same."""
        changed = {*self.layers, *self.source.whole}
        if not any(changed & set(group) for group in skeleton.tied):
            return set()
        for config in (self.config, self.config.get_text_config()):
            config.tie_word_embeddings = False
        still = Skeleton(self.config, self.source.config.get("task_type"), trust).tied
        for group in still:
            if changed & set(group):
                raise AFLoRAError(
                    f"{' and '.join(group)} are one parameter in {type(skeleton.model).__name__} and cannot be untied, "
                    f"but the adapter changes one of them. Serve the adapter with `aflora to-lora`."
                )
        return {name for group in skeleton.tied for name in group} - {name for group in still for name in group}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the merged model, by name, one at a time."""
        done = set()
        for name, key in self.stored.items():
            yield name, self._tensor(name, key)
            done.add(name)
        for name in sorted({*self.source.whole, *self.untied} - done):
            yield name, self._tensor(name, self._key(name))

    @torch.no_grad()
    def _tensor(self, name: str, key: str | None) -> Tensor:
        if name in self.source.whole:
            new = self.source.tensors[self.source.whole[name]]
            return new if key is None else new.to(self.shards[key].dtype)
        assert key is not None, "only what trains whole is new"
        weight = self.shards[key]
        if name not in self.layers:
            return weight
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise AFLoRAError(f"{name} is stored as {weight.dtype}: it is quantised. Merge into the model before that.")
        A, B, s_d, s_b = self.source.path(self.layers[name])
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta = lora_up(B, s_d, s_b).to(exact) @ A.to(exact)
        if isinstance(self.modules[name.removesuffix(".weight")], Conv1D):  # (in, out)
            delta = delta.T
        if delta.shape != weight.shape:
            raise AFLoRAError(
                f"{name} is {tuple(weight.shape)} in the base model and {tuple(delta.shape)} in the adapter: it was "
                f"trained on another model."
            )
        return (weight.to(exact) + delta).to(weight.dtype)

    def notes(self) -> list[str]:
        run: Any = self.source.run
        said = []
        if run and (how := run["model"].get("quantize")):
            said.append(
                f"The adapter was trained on weights held in {how} and is merged into those before quantisation: the "
                f"merged model computes something slightly else. Measure it before it is used."
            )
        if self.untied:
            said.append(f"Weights that were one are stored apart now: {', '.join(sorted(self.untied))}.")
        return said


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Write safetensors files of at most so many bytes each (a larger tensor has one of its own), with an index."""
    files: list[list[str]] = []
    total = held = 0
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f".{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / ".0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        called = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f".{number}.safetensors").rename(folder / called)
        weight_map |= dict.fromkeys(names, called)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
