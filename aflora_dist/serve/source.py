"""What is exported: an adapter's folder, read tensor by tensor, and the run that it is of. Loads no model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from .. import nested
from ..errors import AFLoRAError, writing
from ..names import of_base
from ..store.checkpoint import StoredTensors
from ..store.records import CONFIG, RESULT, loads, read_config

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TENSORS = ("A", "B", "s_d", "s_b")


@dataclass(frozen=True)
class Source:
    """An AFLoRA adapter.

    Attributes:
        folder: Where adapter_config.json lies.
        config: Its content.
        tensors: adapter_model.safetensors, each read when asked for.
        layers: Names of the adapted layers, as the adapter's file has them (base_model.model. ...).
        whole: Of modules that train whole and of trained biases: key in the file, by the model's own name.
        run: config.yaml of the run, where the adapter lies in one.
        result: result.json of the run, likewise.
    """

    folder: Path
    config: dict[str, Any]
    tensors: StoredTensors
    layers: list[str]
    whole: dict[str, str]
    run: dict[str, Any] | None
    result: dict[str, Any] | None

    def path(self, layer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, s_d and s_b of an adapted layer."""
        A, B, s_d, s_b = (self.tensors[f"{layer}.aflora.{name}"] for name in _TENSORS)
        return A, B, s_d, s_b


def read(path: Path) -> Source:
    """The adapter in a run's directory, or in an adapter's folder.

    Raises:
        AFLoRAError: There is none, it is of another method, or it is not whole.
    """
    folder = path / "adapter" if (path / "adapter" / _CONFIG).is_file() else path
    if not (folder / _CONFIG).is_file():
        unfinished = " The run has not ended: --resume ends it." if (path / "config.yaml").is_file() else ""
        raise AFLoRAError(f"{path} is neither a run's directory with adapter/ nor an adapter's folder.{unfinished}")
    config = nested.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "AFLORA":
        raise AFLoRAError(
            f"{folder} holds an adapter of the method {config.get('peft_type')}, not of AFLoRA: PEFT itself loads it, "
            f"and its merge_and_unload merges it."
        )
    if not (folder / _WEIGHTS).is_file():
        raise AFLoRAError(f"{folder} has no {_WEIGHTS}: save the adapter in that format (PEFT's default).")
    try:
        tensors = StoredTensors(folder / _WEIGHTS)
    except SafetensorError as error:
        raise AFLoRAError(f"{folder / _WEIGHTS} is damaged: {error}.") from None
    layers = [key.removesuffix(".aflora.s_b") for key in tensors if key.endswith(".aflora.s_b")]
    for layer in layers:
        for name in _TENSORS:
            if f"{layer}.aflora.{name}" not in tensors:
                raise AFLoRAError(f"{folder / _WEIGHTS} is not whole: it lacks {layer}.aflora.{name}.")
    if not layers:
        raise AFLoRAError(f"{folder / _WEIGHTS} holds no AFLoRA layer.")
    whole = {of_base(key).replace(".base_layer.", "."): key for key in tensors if ".aflora." not in key}
    return Source(folder, config, tensors, layers, whole, *_run(folder.parent))


def _run(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    if not (directory / CONFIG).is_file():
        return None, None
    config = read_config(directory)
    if not isinstance(config, dict) or not {"model", "data", "train"} <= config.keys():
        return None, None  # the adapter lies beside other people's files
    result = directory / RESULT
    try:
        return config, loads(result.read_bytes()) if result.is_file() else None
    except ValueError as error:
        raise AFLoRAError(f"{result} is cut or damaged ({error}). Mend it, or put it aside.") from None


@contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all is written; nothing is left of it if that fails.

    Raises:
        AFLoRAError: `out` holds something already, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AFLoRAError(f"{out} exists already and is not an empty folder; nothing is overwritten. Name another.")
    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        with writing(what, out):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
