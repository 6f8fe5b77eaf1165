"""What is left of a run: a small JSON file, by which its study goes on where the run's directory is gone."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import cache
from os.path import expanduser
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ..errors import AFLoRAError, writing
from ..options import Config, changes_nothing, flat
from ..store.fingerprint import of_settings, of_weights
from ..store.records import RESULT, Result, Run, as_result, dumps, loads
from ..store.typed import number
from ..tasks.glue import TASKS
from ..untrusted import reading
from ..version import __version__
from ..weights import local_weight_files

_KEPT = (
    *("metrics", "evaluations", "engine", "world_size", "mixed_precision", "steps", "train_examples"),
    *("train_seconds", "train_cpu_seconds", "avg_trainable_params", "head_params", "lora_r8_trainable_params"),
    *("freezable_matrices", "freeze_events", "freeze_seconds_total", "peak_memory_bytes"),
)
# Of what else may differ between a run and its continuation: what is trained on, how long, and what is kept of it.
_FILES = ("data.train_file", "data.validation_file")
_DECIDE = ("run.eval_every", "run.keep_best", "run.patience")
_MOST_MATRICES = 400  # whose steps of freezing are kept
_WHOLE = 1e5  # from where on six digits would not show a number of parameters
_FIRST_YEAR = 1970  # where a machine's clock begins that nobody has set
_TYPED, _COUNTED = {option.name for option in fields(Result)}, ("peak_memory_bytes", "train_cpu_seconds")


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
        told["model.name"] = _model(changed["model.name"])
    if "data.name" in changed:
        name = changed["data.name"]
        told["data.name"] = name if name == "demo" else _source("data.name", name)  # made up, whatever lies here
    if "data.mix" in changed:
        told["data.mix"] = [[_source("data.mix", name), n] for name, n in config.data.mix.items()]
    if config.data.path is not None and (task := TASKS.get(config.data.task)) is not None:  # of other tasks' files none
        files = [str(Path(config.data.path, task.folder, file)) for _, file in task.files]
        told["data.path"] = [_content("data.path", file) for file in files]
    return {name: value for name, value in changed.items() if not changes_nothing(name)} | told


def _model(folder: str) -> str:
    files = local_weight_files(folder, None)
    if not files:  # of what kind it is, only the run will know
        return _content("model.name", folder)
    said = [(file, *_touched(file)) for file in (*files, files[0].with_name("config.json")) if file.exists()]
    return _digest_of_model(folder, tuple(said))


@cache  # as `_digest`
def _digest_of_model(folder: str, files: tuple[tuple[Path, int, int], ...]) -> str:
    with reading(Path(folder), "Name the folder of a whole model with --model.name."):
        return f"{of_weights(folder, None)} {of_settings(folder, None)}"


def _source(option: str, name: str) -> str:
    """What lies on disk by its content, also with SUBSET:SPLIT behind it; all else is of the hub."""
    at = expanduser(name)
    if Path(at).is_file():
        return _content(option, name)
    folder, sign, part = at.partition(":")
    return f"{_content(option, folder)}{sign}{part}" if folder and Path(folder).is_dir() else name


def _content(option: str, named: str) -> str:
    there = Path(expanduser(named))  # as who reads it
    try:
        if not there.is_dir():
            return _content_of(there)
        inside = sorted((file.relative_to(there), file) for file in there.rglob("*") if file.is_file())
        # What is hidden is no data: a clone's .git.
        told = [(str(at), _content_of(file)) for at, file in inside if not any(part[0] == "." for part in at.parts)]
        return f"folder sha256 {hashlib.sha256(json.dumps(told).encode()).hexdigest()}"
    except OSError as error:
        raise AFLoRAError(f"{option}={named} could not be read: {error.strerror or error}.") from None


def _content_of(file: Path) -> str:
    return _digest(file.resolve(), *_touched(file))


def _touched(file: Path) -> tuple[int, int]:
    """Size and time of the last change: with other ones a file is another one."""
    said = file.stat()
    return said.st_size, said.st_mtime_ns


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
        """Look for what others have added; an AFLoRAError if a file is damaged."""
        if self.folder.exists() and not self.folder.is_dir():
            raise AFLoRAError(f"{self.folder}, where results are to go, is a file. Name a folder with --results.")
        for file in sorted(self.folder.glob("*-seed*.json")):
            if file.stem in self.records:
                continue
            try:
                record = loads(file.read_bytes())
                sound = _is_sound(record, file.stem)
            except FileNotFoundError:  # deleted in this moment
                continue
            except OSError as error:
                raise AFLoRAError(f"{file} could not be read: {error.strerror or error}.") from None
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                sound = False
            if not sound:
                raise AFLoRAError(f"{file} is no run's result, or damaged. Delete it, and the run is done again.")
            self.records[file.stem] = record

    def refuse_unwritable(self) -> None:
        """Raise an AFLoRAError where nothing could be kept: before a run takes hours."""
        with writing("A run's result", self.folder, "Name another folder with --results."):
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.folder).close()

    def keep(
        self, name: str, config: Config, found: Mapping[str, Any], seconds: float | None, ended: datetime | None = None
    ) -> None:
        """Write a run's result.

        Args:
            found: What result.json holds, or {"failed": why}.
            seconds: From its start to its end, if it was not interrupted.
            ended: When; now if it is not given.
        """
        said = {"settings": settings_of(config), "seed": config.train.seed}  # by every digit of which it is named
        record: dict[str, Any] = {key: found[key] for key in ("failed", "frozen", *_KEPT) if found.get(key) is not None}
        at = (ended or datetime.now(UTC)).isoformat(timespec="minutes")  # seconds of other times are another machine's
        record |= {"seconds": seconds, "ended": at, "version": __version__}
        with writing("A run's result", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"  # others write it, too
            temporary.write_text(dumps(said | _rounded(record), indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.folder / f"{name}.json")
        self.records[name] = loads((self.folder / f"{name}.json").read_bytes())


def _is_sound(record: Any, name: str) -> bool:
    """Whether a file holds what `keep` writes, under the name of the run that it tells of.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: It does not.
    """
    settings = record["settings"]
    task, method = settings.get("data.task", "demo"), settings.get("method.name", "aflora")
    if name != name_by(task, method, settings, record["seed"]) or not isinstance(record["seconds"], float | int | None):
        return False
    ended = datetime.fromisoformat(record["ended"])
    if ended.tzinfo is None or ended.year < _FIRST_YEAR:
        return False
    if "failed" in record:
        return isinstance(record["failed"], str)
    result = as_result(record)
    typed = all(getattr(result, key) == record[key] and record[key] is not None for key in _TYPED if key in record)
    counted = [record.get(key, 1) for key in _COUNTED] + [*record.get("frozen", {}).values()]
    sound = typed and isinstance(record["version"], str) and all(number(n) is not None for n in counted)
    return sound and bool(result.evaluations and result.train_seconds)


def result_in(path: Path) -> dict[str, Any] | None:
    """result.json of a run's directory, with the step after which each matrix froze; None: it has not ended.

    Raises an AFLoRAError if it cannot be read, or is cut.
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
    """Floats to six significant digits, for times and metrics have no more; those of counts are all kept."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < _WHOLE else round(value, 1)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value
