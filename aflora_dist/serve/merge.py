"""`aflora merge`: an adapter merged into its model's weights, one tensor at a time, in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..adapter import lora_up
from ..errors import AFLoRAError
from ..names import of_base
from ..untrusted import read_object, reading
from .base import Shards, Skeleton, beside_weights, find_base, load_config
from .card import write_card
from .source import TOKENIZER, Source, check_base, new_folder, read_adapter


def merge(
    run: Path, out: Path, base: str | None = None, shard_bytes: int = 2 * 10**9, trust_remote_code: bool = False
) -> list[str]:
    """Write the model with the adapter in its weights. Holds `shard_bytes` of it at a time, or one tensor.

    The sum is taken in float32 and stored in the weight's own dtype.

    Args:
        run: A run's directory, or an adapter's folder.
        out: Does not exist yet, or is empty.
        base: Another folder or hub id of the model than the adapter's configuration names.
        shard_bytes: Largest size of a file of weights, unless one tensor is larger.
        trust_remote_code: Run modelling code that lies in the base model's folder. Nothing that is read switches it on.

    Returns:
        What to mind, a sentence each.

    Raises:
        AFLoRAError: It cannot be merged exactly; the message says why.
    """
    source = read_adapter(run)
    name = base or source.config["base_model_name_or_path"]
    if not name:
        raise AFLoRAError(f"{source.folder} does not name its base model: name it with --base.")
    with new_folder(out, "The merged model") as folder:  # looks at `out` before anything is fetched
        base_folder = find_base(name, None if base else source.config["revision"])
        unsure = [] if base else check_base(source, name, base_folder, "--base")
        merged = Merged(source, base_folder, trust_remote_code)
        write_shards(merged.tensors(), folder, shard_bytes)
        merged.config.save_pretrained(folder)
        for path in merged.beside():
            shutil.copyfile(path, folder / path.name)
        if merged.padding is not None and (generation := folder / "generation_config.json").exists():
            settings = {**read_object(generation), "pad_token_id": merged.padding}
            generation.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        said = merged.notes() + unsure
        write_card(folder, source, "merge", run, out, said)
    return source.problems + said


class Merged:
    """The merged model's tensors and configuration.

    Attributes:
        config: The model's own, with the class, labels, padding and untying that the merged weights need.
        padding: The pad token of the tokenizer that lies beside the adapter; None: there is none, or it has none.

    Raises:
        AFLoRAError: A tensor of the adapter has no place in the checkpoint, or the base is quantised.
    """

    def __init__(self, source: Source, base: Path, trust: bool) -> None:
        self.source, self.base, self.shards = source, base, Shards(base)
        self.trust, self.task_type = trust, source.config["task_type"]
        self.config = load_config(base, trust)
        self.lacking: list[str] = []  # modules whose weights neither the base nor the adapter has
        self.outside = 0  # tokens that the tokenizer has and the embedding has not
        self.padding = self._set_padding()
        self._set_labels()
        skeleton = Skeleton(base, self.config, self.task_type, trust)
        self.modules = dict(skeleton.model.named_modules())
        self.stored = skeleton.stored(self.shards)
        self.layers = {f"{of_base(layer)}.weight": layer for layer in source.layers}
        # Where a tied weight is stored under another of its names, it is read there.
        self.aliases = {name: group for group in skeleton.tied for name in group}
        self._check_places(skeleton)
        self.untied = self._untie(skeleton)
        self.config.architectures = [type(skeleton.model).__name__]

    def beside(self) -> list[Path]:
        """What is copied as it is: the tokenizer beside the adapter goes before the base model's."""
        taken = {path.name: path for path in beside_weights(self.base)}
        if self.source.has_tokenizer:
            replaced = {path.name for pattern in TOKENIZER for path in self.base.glob(pattern)}
            taken = {name: path for name, path in taken.items() if name not in replaced}
        return [*(taken | {path.name: path for path in self.source.tokenizer}).values()]

    def _set_padding(self) -> int | None:
        """The pad token that the model was trained with; GPT-like classifiers look for the last token before it."""
        text = self.config.get_text_config()
        beside = self.source.has_tokenizer
        said = getattr(text, "pad_token_id", None) is not None and self.source.run is None  # a run took the tokenizer's
        if not beside and (self.task_type != "SEQ_CLS" or said):
            return None
        folder = self.source.folder if beside else self.base
        with reading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust)
            padding = tokenizer.pad_token_id
            if padding is None and self.task_type == "SEQ_CLS":
                padding = tokenizer.eos_token_id
            self.outside = max(0, len(tokenizer) - (getattr(text, "vocab_size", None) or len(tokenizer)))
        if padding is None or padding >= getattr(text, "vocab_size", padding + 1):
            return None
        self.config.pad_token_id = text.pad_token_id = padding
        return padding if beside else None

    def _set_labels(self) -> None:
        """What a classifier's configuration has, as the training had it."""
        if self.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
            return
        several = self.source.run is None and self.config.problem_type == "multi_label_classification"
        if (outputs := self.source.outputs(self.source.tensors)) is not None:
            several = several and outputs == self.config.num_labels  # else the head is the adapter's own
            self.config.num_labels = outputs
        if self.task_type != "SEQ_CLS":
            return
        labels = self.source.labels
        if labels is not None and len(labels) == self.config.num_labels:
            self.config.id2label = dict(enumerate(labels))
            self.config.label2id = {label: i for i, label in enumerate(labels)}
        if self.config.num_labels == 1:
            self.config.problem_type = "regression"
        elif not several:  # somebody else's, whose base says that a text may have several labels
            self.config.problem_type = "single_label_classification"

    def _check_places(self, skeleton: Skeleton) -> None:
        held = {*skeleton.shapes} - skeleton.lacking
        for name in (*self.layers, *filter(held.__contains__, self.source.whole)):
            if self._key(name) is None:  # what trained whole would lie beside its old self, under another name
                how = "adapted" if name in self.layers else "trained whole"
                raise AFLoRAError(
                    f"{name} is {how}, but the checkpoint of the base model holds no such tensor: it is stored in "
                    f"another form and converted when it is loaded. Load the model, save it with save_pretrained(..., "
                    f"save_original_format=False), and name that folder with --base; or serve the adapter with `aflora "
                    f"to-lora`."
                )
        self.lacking = sorted({name.rpartition(".")[0] for name in skeleton.lacking.difference(self.source.whole)})
        for name, key in self.source.whole.items():
            if name not in skeleton.names:
                kind = "trained bias" if name.endswith("bias") else "tensor that trains whole"
                raise AFLoRAError(
                    f"The adapter holds the {kind} {key}, which has no place in {type(skeleton.model).__name__}. Is "
                    f"this the base model that it was trained on? Load both with PEFT and call merge_and_unload."
                )
            there, here = skeleton.shapes.get(name), self.source.tensor(key).shape
            if there is not None and there != here:
                raise AFLoRAError(
                    f"{name} is {tuple(there)} in {type(skeleton.model).__name__} and {tuple(here)} in the adapter, "
                    f"which replaces it: the model was changed before it was trained (resized embeddings?). Save the "
                    f"changed model, and name its folder with --base."
                )

    def _key(self, name: str) -> str | None:
        """Where the checkpoint stores this parameter."""
        return next((self.stored[n] for n in [name, *self.aliases.get(name, [])] if n in self.stored), None)

    def _untie(self, skeleton: Skeleton) -> set[str]:
        """Parameters to be stored under each of their names, for they are no longer one and the same."""
        changed = {*self.layers, *self.source.whole}
        if not any(changed & set(group) for group in skeleton.tied):
            return set()
        for config in (self.config, self.config.get_text_config()):
            config.tie_word_embeddings = False
        still = Skeleton(self.base, self.config, self.task_type, self.trust).tied
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
            weight = self.source.tensor(self.source.whole[name])
            weight = weight if key is None else weight.to(self.shards[key].dtype)
        else:
            assert key is not None, "only what trains whole is new"
            weight = self.shards[key]
        if name not in self.layers:
            return weight
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise AFLoRAError(f"{name} is stored as {weight.dtype}: it is quantised. Merge into the model before that.")
        A, B, s_d, s_b = self.source.path(self.layers[name])
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta = lora_up(B, s_d, s_b).to(exact) @ A.to(exact)
        if isinstance(self.modules.get(name.removesuffix(".weight")), Conv1D):  # (in, out)
            delta = delta.T
        if delta.shape != weight.shape:
            raise AFLoRAError(
                f"{name} is {tuple(weight.shape)} in the base model and {tuple(delta.shape)} in the adapter: it was "
                f"trained on another model."
            )
        return (weight.to(exact) + delta).to(weight.dtype)

    def notes(self) -> list[str]:
        said = []
        if self.source.run is not None and (how := self.source.run.values["model"].get("quantize")):
            said.append(
                f"The adapter was trained on weights held in {how} and is merged into those before quantisation: the "
                f"merged model computes something slightly else. Measure it before it is used."
            )
        if self.lacking:
            said.append(
                f"Neither the adapter nor its base model holds the weights of {', '.join(self.lacking[:5])}: they are "
                f"random wherever the merged model is loaded."
            )
        if self.untied:
            said.append(f"Weights that were one are stored apart now: {', '.join(sorted(self.untied))}.")
        if self.outside:
            said.append(
                f"The tokenizer beside the adapter has {self.outside} tokens more than the model's embedding, which "
                f"cannot read texts with them."
            )
        return said


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Write safetensors files of at most so many bytes each (a larger tensor has one of its own), with an index."""
    files: list[list[str]] = []
    total = held = 0
    shard: dict[str, Tensor] = {}
    places: set[int] = set()  # the memory of its tensors

    def flush() -> None:
        save_file(shard, folder / f".{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()
        places.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        tensor = tensor.contiguous()
        if (place := tensor.untyped_storage().data_ptr()) in places:  # a pickle ties them
            tensor = tensor.clone()
        places.add(place)
        shard[name] = tensor
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
