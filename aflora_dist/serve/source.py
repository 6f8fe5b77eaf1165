"""What is exported: an adapter's folder, read tensor by tensor, and the run that it is of. Loads no model.

Who made the folder is not known: what is read of it is checked here, and of its run only what is typed is kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor

from ..adapter import read_labels
from ..errors import AFLoRAError, writing
from ..names import of_base
from ..store.checkpoint import StoredTensors
from ..store.fingerprint import of_weights
from ..store.records import CONFIG, RESULT, Result, Settings, read_result, read_settings
from ..untrusted import check_copied, read_object, reading

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TENSORS = ("A", "B", "s_d", "s_b")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Of these there is one set: a tokenizer beside the adapter replaces the base model's whole.
TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    *_TEMPLATES,
)


def refuse_unsound(folder: Path, key: str, tensor: Tensor) -> None:
    """Raise an AFLoRAError if a tensor of the adapter in a folder holds something that is no number."""
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise AFLoRAError(
            f"{folder / _WEIGHTS}: {key} holds values that are not finite numbers: the training diverged, or the file "
            f"is damaged."
        )


@dataclass(frozen=True)
class Source:
    """An adapter.

    Attributes:
        folder: Where adapter_config.json lies.
        config: Its content.
        tensors: adapter_model.safetensors, each read when asked for.
        layers: Names of the layers that AFLoRA adapts, as the adapter's file has them (base_model.model. ...).
        whole: Of modules that train whole and of trained biases: key in the file, by the model's own name.
        run: config.yaml of the run, where the adapter lies in one.
        result: result.json of the run, likewise.
        problems: What of the run could not be read.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    layers: list[str]
    whole: dict[str, str]
    run: Settings | None
    result: Result | None
    problems: list[str]

    def path(self, layer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, s_d and s_b of an adapted layer; an AFLoRAError if they are not of one rank."""
        A, B, s_d, s_b = found = tuple(self.tensor(f"{layer}.aflora.{name}") for name in _TENSORS)
        r = self.config["r"]
        if (
            A.dim() != 2
            or B.dim() != 2
            or (A.shape[0], B.shape[1], *s_d.shape) != (r, r, r)
            or s_b.shape != B.shape[:1]
        ):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(_TENSORS, found, strict=True))
            raise AFLoRAError(f"{self.folder / _WEIGHTS}: {layer} has {shapes}, which is no path of rank r={r}.")
        return A, B, s_d, s_b

    def tensor(self, key: str) -> Tensor:
        """A tensor of the adapter's file; an AFLoRAError if it cannot be read, or holds what is no number."""
        with reading(self.folder / _WEIGHTS):
            tensor = self.tensors[key]
        refuse_unsound(self.folder, key, tensor)
        return tensor

    @property
    def labels(self) -> list[str] | None:
        """Class names by number; None where nothing says them."""
        if (found := read_labels(self.config)) is not None:
            return found
        return None if self.result is None else self.result.labels or None

    def outputs(self, tensors: Mapping[str, Tensor]) -> int | None:
        """How many numbers a classifier says: the rows of the last layer of its head; None: these tensors hold none."""
        heads = {*SEQ_CLS_HEAD_NAMES, *(self.config.get("modules_to_save") or ())}
        shapes = [tensors[key].shape for key in tensors if key.endswith(".weight") and heads & {*key.split(".")}]
        rows = {shape[0] for shape in shapes if len(shape) == 2}
        if self.labels is not None and (not rows or len(self.labels) in rows):
            return len(self.labels)
        inner = {shape[1] for shape in shapes if len(shape) == 2}  # what a layer of a head gives to the next
        return min(rows - inner or rows, default=None)

    @property
    def tokenizer(self) -> list[Path]:
        """The files of a tokenizer that lies beside the adapter, or of a chat template alone."""
        found = sorted({path for pattern in TOKENIZER for path in self.folder.glob(pattern) if path.is_file()})
        return [check_copied(path, self.folder) for path in found]

    @property
    def has_tokenizer(self) -> bool:
        return any(path.name not in _TEMPLATES for path in self.tokenizer)


def trained_folder(path: Path) -> Path:
    """Where a run's directory, or a folder of adapters by name, has what was trained; else the folder itself.

    PEFT writes an adapter that is called "adapter" beside the one that is called "default".
    """
    inner = path / "adapter"
    return inner if inner.is_dir() and ((path / CONFIG).is_file() or not (path / _CONFIG).is_file()) else path


def read_adapter(path: Path, any_method: bool = False) -> Source:
    """The adapter in a run's directory, or in an adapter's folder.

    Args:
        any_method: Take one of another method than AFLoRA, too, with nothing of its tensors.

    Raises:
        AFLoRAError: There is none, it is of another method, or it is not whole.
    """
    folder = trained_folder(path)
    if not (folder / _CONFIG).is_file():
        if (folder / "config.json").is_file():
            raise AFLoRAError(f"{folder} is a whole model, and no adapter: nothing is to be merged.")
        if inside := sorted(file.parent.name for file in folder.glob(f"*/{_CONFIG}")):
            raise AFLoRAError(
                f"{folder} is no adapter's folder, but holds some: {', '.join(inside[:10])}. Name the folder of one, "
                f"as {folder / inside[-1]}."
            )
        ends = not (path / CONFIG).is_file() or (path / RESULT).exists()
        unfinished = "" if ends else " The run has not ended: --resume ends it."
        raise AFLoRAError(f"{path} is neither a run's directory with adapter/ nor an adapter's folder.{unfinished}")
    config = read_object(folder / _CONFIG)
    others = config.get("peft_type") != "AFLORA"
    if others and not any_method:
        raise AFLoRAError(
            f"{folder} holds an adapter of the method {config.get('peft_type')}, not of AFLoRA: PEFT itself loads it, "
            f"and its merge_and_unload merges it."
        )
    _check_config(config, folder / _CONFIG)
    if others:
        return Source(folder, config, {}, [], {}, *_run(folder.parent))
    if not (folder / _WEIGHTS).is_file():
        raise AFLoRAError(f"{folder} has no {_WEIGHTS}: save the adapter in that format (PEFT's default).")
    with reading(folder / _WEIGHTS, "It is damaged."):
        tensors = StoredTensors(folder / _WEIGHTS)
    layers = [key.removesuffix(".aflora.s_b") for key in tensors if key.endswith(".aflora.s_b")]
    for layer in layers:
        for name in _TENSORS:
            if f"{layer}.aflora.{name}" not in tensors:
                raise AFLoRAError(f"{folder / _WEIGHTS} is not whole: it lacks {layer}.aflora.{name}.")
    if not layers:
        raise AFLoRAError(f"{folder / _WEIGHTS} holds no AFLoRA layer.")
    # Of embeddings PEFT may write what its wrapper holds, too (save_embedding_layers).
    whole = {
        of_base(key).replace(".base_layer.", "."): key
        for key in tensors
        if not {"aflora", "modules_to_save", "original_module"} & {*key.split(".")}
    }
    return Source(folder, config, tensors, layers, whole, *_run(folder.parent))


def check_base(source: Source, name: str, found: Path, option: str, revision: str | None = None) -> list[str]:
    """What to mind of a base model that the adapter, or its run, names: a path is another one in another folder.

    Args:
        found: Where it lies; or its hub id.
        option: By which another one is named.

    Raises:
        AFLoRAError: It has other weights than the one that was trained.
    """
    trained = None if source.result is None else source.result.base_weights
    if trained is not None:
        with reading(found):
            here = of_weights(str(found), revision)
        if here == trained:
            return []
        if here is not None:
            raise AFLoRAError(
                f"{found} has other weights than the base model that the adapter in {source.folder} was trained on, "
                f"which its run calls {name}. Name the folder of that one with {option}."
            )
    if Path(name).is_absolute() or not Path(name).is_dir():
        return []
    return [
        f"The adapter names its base model by a relative path, {name}, and {found.resolve()} was taken: if it was "
        f"trained on another model, name that one with {option}."
    ]


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raise unless what is used of adapter_config.json is of the type that PEFT writes."""
    for key in ("task_type", "base_model_name_or_path", "revision"):
        if not isinstance(config.setdefault(key, None), str | None):
            raise AFLoRAError(f"{path}: {key} is no text.")
    if config["task_type"] not in (None, *TaskType):
        raise AFLoRAError(f"{path}: task_type is none of {', '.join(TaskType)}.")
    if config.get("peft_type") != "AFLORA":
        return
    if isinstance(config.get("r"), bool) or not isinstance(config.get("r"), int) or config["r"] < 1:
        raise AFLoRAError(f"{path}: the rank r is no positive whole number.")
    if config.setdefault("bias", "none") not in ("none", "all", "aflora_only"):
        raise AFLoRAError(f"{path}: bias is none of none, all, aflora_only.")
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise AFLoRAError(f"{path}: modules_to_save is no list of names.")


def _run(directory: Path) -> tuple[Settings | None, Result | None, list[str]]:
    problems: list[str] = []
    if not (directory / CONFIG).exists():
        return None, None, problems
    settings = read_settings(directory)  # None: the adapter lies beside other people's files
    return settings, None if settings is None else read_result(directory, problems), problems


@contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """A folder to write into. When all is written it becomes `out`, or, where that is an empty folder, fills it.

    If the writing fails, nothing is left of it.

    Raises:
        AFLoRAError: `out` holds something already, or cannot be written.
    """
    ours = f".{out.resolve().name}.*.tmp"  # of a process that was killed
    if out.exists() and not (out.is_dir() and all(path.match(ours) for path in out.iterdir())):
        raise AFLoRAError(f"{out} exists already and is not an empty folder; nothing is overwritten. Name another.")
    out, name = out.resolve(), ours.replace("*", str(os.getpid()))
    there = out.is_dir()  # which may be the working directory, or mounted, and then cannot be replaced
    temporary = out / name if there else out.with_name(name)
    try:
        with writing(what, out):
            temporary.mkdir(parents=True)
            yield temporary
            if not there:
                temporary.replace(out)
            for path in temporary.iterdir() if there else ():
                path.rename(out / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
