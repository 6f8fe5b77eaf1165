"""Checkpoints: a training's state by name, in safetensors and JSON, written whole or not at all.

Which engine wrote one, and how many ranks, does not matter to who reads it. A checkpoint is a folder:

    state.safetensors   values and moments of what trains, what is frozen, score averages, RNG states
    training.json       step, freeze log, learning-rate schedule, counters, configuration, versions
    manifest.json       size and SHA-256 of the two; written last, so without it nothing is complete
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import untrusted
from ..errors import AFLoRAError, DamagedError, DivergedError
from ..processes import on_main

FORMAT = 3
_NAME = re.compile(r"step_\d{8,}")
_STATE, _TRAINING, _MANIFEST = "state.safetensors", "training.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's content.

    Attributes:
        tensors: state.safetensors, each read when asked for.
        training: training.json.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    training: dict[str, Any]


class StoredTensors(Mapping[str, Tensor]):
    """A safetensors file's content, on the CPU; no tensor is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(str(path), framework="pt")
        self._keys = list(self._file.keys())
        self._known = set(self._keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._known:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], training: Mapping[str, Any], keep: int) -> Path:
    """Write `folder`/step_STEP and delete the oldest ones beyond `keep`. For one process only.

    Written under a temporary name, synced to the disk and then renamed: whoever is killed here
    leaves what was saved before as it was.

    Raises:
        DivergedError: A tensor is not finite.
        OSError, SafetensorError: The disk is full, or the folder cannot be written; what was saved
            before is unharmed.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if broken := next((name for name, tensor in content.items() if not tensor.isfinite().all()), None):
            raise DivergedError(f"{broken} is not finite, so no checkpoint is written. Lower the learning rate.")
        save_file(content, str(temporary / _STATE))
        (temporary / _TRAINING).write_text(json.dumps({"format": FORMAT, **training}), encoding="utf-8")
        manifest = {name: _fingerprint(temporary / name) for name in (_STATE, _TRAINING)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        os.replace(temporary, target)
        _sync(folder)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete and damaged checkpoints in a folder, newest first; what a user calls otherwise is left to them."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def list_abandoned(folder: Path) -> list[Path]:
    """Checkpoints that another branch of the run has left, as abandoned_step_STEP."""
    return [path for path in folder.glob("abandoned_*") if _NAME.fullmatch(path.name.removeprefix("abandoned_"))]


def step_of(path: Path) -> int:
    """The updates after which a checkpoint was written, by its name."""
    return int(path.name.removeprefix("step_"))


def are_one(path: Path, other: Path) -> bool:
    """Whether two folders are the same checkpoint, or copies of it, by what their manifests say."""
    return path.resolve() == other.resolve() or (path / _MANIFEST).read_bytes() == (other / _MANIFEST).read_bytes()


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, and check every byte of it first.

    Raises:
        DamagedError: It is not what was written; the message says what is wrong.
        AFLoRAError: It has another format.
    """
    complaint = _damage(path)
    if complaint is not None:
        raise DamagedError(f"The checkpoint {path} is damaged: {complaint}.")
    training = untrusted.load_json((path / _TRAINING).read_text(encoding="utf-8"))
    if not isinstance(training, dict):
        raise DamagedError(f"The checkpoint {path} is damaged: {_TRAINING} holds no names and values.")
    if training.get("format") != FORMAT:
        raise AFLoRAError(
            f"The checkpoint {path} has format {training.get('format')}; this version of aflora_dist reads {FORMAT}. "
            f"Finish that run with the release that began it, or begin anew."
        )
    return Checkpoint(path, StoredTensors(path / _STATE), training)


def read_on_main(accelerator: Accelerator, choose: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What `choose` reads on the main process; the other ranks have an empty `tensors`. A collective."""
    chosen: Checkpoint | None = None

    def read() -> tuple[Path, dict[str, Any]] | None:
        nonlocal chosen
        chosen = choose()
        return None if chosen is None else (chosen.path, chosen.training)

    found = on_main(accelerator, read)
    return chosen if chosen is not None or found is None else Checkpoint(found[0], {}, found[1])


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those after it.

    Raises:
        AFLoRAError: It has another format.
    """
    complaints: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load(path), complaints
        except DamagedError as error:
            complaints.append(str(error))
    return None, complaints


def _damage(path: Path) -> str | None:
    try:
        manifest = untrusted.load_json((path / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_STATE, _TRAINING):
            expected = manifest[name]
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _fingerprint(path / name) != expected:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
