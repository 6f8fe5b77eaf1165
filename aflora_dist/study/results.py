"""What is left of a run: a small JSON file, by which its study goes on where the run's directory is gone."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import AFLoRAError, writing
from ..options import CHANGES_NOTHING, Config, flat
from ..store.fingerprint import of_settings, of_weights
from ..store.records import RESULT, Run, as_result, dumps, loads
from ..tasks.glue import TASKS
from ..untrusted import reading
from ..version import __version__

_KEPT = (
    *("metrics", "evaluations", "engine", "world_size", "mixed_precision", "steps", "train_examples"),
    *("train_seconds", "train_cpu_seconds", "avg_trainable_params", "head_params", "lora_r8_trainable_params"),
    *("freezable_matrices", "freeze_events", "freeze_seconds_total", "peak_memory_bytes"),
)
# Of what else may differ between a run and its continuation: what is trained on, how long, and what is kept of it.
_FILES = ("data.train_file", "data.validation_file")
_DECIDE = ("run.eval_every", "run.keep_best", "run.patience")
_MOST_MATRICES = 400  # whose steps of freezing are kept


def settings_of(config: Config) -> dict[str, Any]:
    """What a run trains, as option -> value where that is not the default, without its seed.

    What only says where data lie, or how they are cut into micro-batches, is left out: it is the same run. Files and
    folders count by their content, a data set of the hub by its name.

    Raises:
        AFLoRAError: A file of data cannot be read.
    """
    mine, default = flat(asdict(config)), flat(asdict(Config()))
    changed = {name: value for name, value in mine.items() if value != default.get(name) and name != "train.seed"}
    told = {name: changed[name] for name in _DECIDE if name in changed}
    told |= {name: _content(name, changed[name]) for name in _FILES if name in changed}
    if "model.name" in changed and Path(changed["model.name"]).is_dir() and changed["model.name"] != "demo":
        told["model.name"] = f"{of_weights(changed['model.name'], None)} {of_settings(changed['model.name'], None)}"
    if "data.name" in changed:
        name = changed["data.name"]
        told["data.name"] = name if name == "demo" else _source("data.name", name)  # made up, whatever lies here
    if "data.mix" in changed:
        told["data.mix"] = [[_source("data.mix", name), n] for name, n in config.data.mix.items()]
    if config.data.path is not None and (task := TASKS.get(config.data.task)) is not None:  # of other tasks' files none
        files = [str(Path(config.data.path, task.folder, file)) for _, file in task.files]
        told["data.path"] = [_content("data.path", file) for file in files]
    free = [name for name in changed if name in CHANGES_NOTHING or name.partition(".")[0] in CHANGES_NOTHING]
    return {name: value for name, value in changed.items() if name not in free} | told


def _source(option: str, name: str) -> str:
    """What lies on disk by its content, also with SUBSET:SPLIT behind it; all else is of the hub."""
    if Path(name).is_file():
        return _content(option, name)
    folder, sign, part = name.partition(":")
    return f"{_content(option, folder)}{sign}{part}" if folder and Path(folder).is_dir() else name


def _content(option: str, named: str) -> str:
    try:
        if not Path(named).is_dir():
            return _content_of(Path(named))
        inside = sorted((file.relative_to(named), file) for file in Path(named).rglob("*") if file.is_file())
        # What is hidden is no data: a clone's .git.
        told = [(str(at), _content_of(file)) for at, file in inside if not any(part[0] == "." for part in at.parts)]
        return f"folder sha256 {hashlib.sha256(json.dumps(told).encode()).hexdigest()}"
    except OSError as error:
        raise AFLoRAError(f"{option}={named} could not be read: {error.strerror or error}.") from None


def _content_of(file: Path) -> str:
    said = file.stat()
    return _digest(file.resolve(), said.st_size, said.st_mtime_ns)


@cache  # each look at what is left asks for all runs' names
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return f"{path.suffix.lower()} sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}".strip()


def name_of(config: Config) -> str:
    """The run's name: by what and on what, its seed, and what tells it from all others."""
    return name_by(config.data.task, config.method.name, settings_of(config), config.train.seed)


def name_by(task: str, method: str, settings: Mapping[str, Any], seed: int) -> str:
    """The name of a run of these settings, as `settings_of` tells them, or a record keeps them."""
    content = json.dumps(sorted(settings.items()), sort_keys=True)
    mark = hashlib.sha256(content.encode()).hexdigest()[:10]
    return f"{task}-{method}-{mark}-seed{seed}"


class Results:
    """The results in a folder, by the name of their run; whoever works on the same folder adds to them.

    Attributes:
        records: Name -> what the file holds; "failed" instead of metrics tells why a run has none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Look for what others have added.

        Raises:
            AFLoRAError: A file is damaged; the folder is none.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise AFLoRAError(f"{self.folder}, where results are to go, is a file. Name a folder with --results.")
        for file in sorted(self.folder.glob("*-seed*.json")):
            if file.stem in self.records:
                continue
            try:
                record = loads(file.read_bytes())
                whole = "failed" in record or bool(as_result(record).evaluations and record["train_seconds"])
                sound = (
                    isinstance(record["settings"], dict) and whole and isinstance(record["seconds"], float | int | None)
                )
                if "ended" in record:
                    sound &= datetime.fromisoformat(record["ended"]).tzinfo is not None
            except (OSError, ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise AFLoRAError(f"{file} is no run's result, or damaged. Delete it, and the run is done again.")
            self.records[file.stem] = record

    def keep(self, name: str, config: Config, found: Mapping[str, Any], seconds: float | None) -> None:
        """Write a run's result.

        Args:
            found: What result.json holds, or {"failed": why}.
            seconds: From its start to its end, if it was not interrupted.
        """
        record: dict[str, Any] = {"settings": settings_of(config), "seed": config.train.seed}
        record |= {key: found[key] for key in ("failed", "frozen", *_KEPT) if found.get(key) is not None}
        ended = datetime.now(UTC).isoformat(timespec="minutes")  # seconds of other times are another machine's
        record |= {"seconds": seconds, "ended": ended, "version": __version__}
        with writing("A run's result", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            opened, path = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=self.folder)  # others write it, too
            os.close(opened)
            temporary = Path(path)
            temporary.write_text(dumps(_rounded(record), indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.folder / f"{name}.json")
        self.records[name] = loads((self.folder / f"{name}.json").read_bytes())


def result_in(path: Path) -> dict[str, Any] | None:
    """result.json of a run's directory, with the step after which each matrix froze; None: it has not ended.

    Raises:
        AFLoRAError: It cannot be read, or is cut.
    """
    file = path / RESULT
    if not file.is_file():
        return None
    with reading(file, "If it is cut, delete it: the same command goes on from the run's last checkpoint."):
        result: dict[str, Any] = loads(file.read_bytes())
        as_result(result)
    frozen = Run(path).frozen
    if 0 < len(frozen) <= _MOST_MATRICES:
        result["frozen"] = frozen
    return result


def _rounded(value: Any) -> Any:
    """Floats to six significant digits: times and metrics have no more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
