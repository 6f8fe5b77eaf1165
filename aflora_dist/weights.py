"""Which files hold a pretrained model's weights: in a folder, in the hub's cache, on the hub. As transformers looks."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from .errors import AFLoRAError
from .untrusted import read_object, reading, refuse_pointer

DAMAGED = "The model's file is damaged: fetch or save it again."
_INDEX = ".index.json"
# The first that there is counts. An index names the files of a checkpoint that is cut into several.
_STORED = tuple(f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX))


def weight_files(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    """The files, in the order of their names, and by tensor where an index says it; none where there are none.

    Raises an AFLoRAError if the index is none, or names what is not beside it.
    """
    for name in _STORED:
        if (file := folder / name).is_file():
            if not name.endswith(_INDEX):
                return [file], None
            by_tensor = _weight_map(file)
            return sorted({*by_tensor.values()}), by_tensor
    return [], None


def local_weight_files(name: str, revision: str | None) -> list[Path]:
    """Those of a folder, a GGUF file, or a hub id whose files are in the cache; none where they are not here."""
    folder, one = Path(name), None
    if name.endswith(".gguf"):
        folder, one = folder.parent, folder.name
    if not folder.is_dir():
        known = try_to_load_from_cache(str(folder), one or "config.json", revision=revision)
        if not isinstance(known, str):
            return []
        folder = Path(known).parent
    return weight_files(folder)[0] if one is None else [folder / one]


def refuse_damaged(file: Path) -> None:
    """Look whether a file of weights is one, and whole. As far as its beginning and its end tell: no tensor is read.

    Raises:
        AFLoRAError: It is not; the message names it.
    """
    refuse_pointer(file)
    with reading(file, DAMAGED):
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt"):
                return
        with file.open("rb") as opened:
            start = opened.read(4)
        # A pickle of before torch 1.6 is no archive, and tells nothing of where it ends.
        if not (start == b"GGUF" if file.suffix == ".gguf" else start[:2] == b"\x80\x02" or zipfile.is_zipfile(file)):
            raise ValueError("it is cut, or no file of weights")


def download_weights(name: str, revision: str | None, gguf_file: str | None) -> None:
    """Have the files that from_pretrained takes in the hub's cache; raises its OSError if they cannot be had."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    missing: OSError | None = None
    for file in _STORED if gguf_file is None else (gguf_file,):
        try:
            found = cached_file(name, file, revision=revision)
        except OSError as error:
            missing = missing or error
            continue
        if file.endswith(_INDEX):
            get_checkpoint_shard_files(name, found, revision=revision)
        return
    assert missing is not None
    raise missing


def _weight_map(index: Path) -> dict[str, Path]:
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise AFLoRAError(f"{index} has no weight_map.")
    return {key: _beside(index, name) for key, name in files.items()}


def _beside(index: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise AFLoRAError(f"The index of {index.parent} names {name!r}, which is no file in that folder.")
    if not (file := index.with_name(name)).is_file():  # a pipe would be waited for
        raise AFLoRAError(f"{file} is missing, which the model's index names: fetch or save the model again.")
    return file
