"""A run's records as other tools read them: typed, whichever release wrote them and however much of them is there.

What is written is JSON as strict readers want it. What is read may be cut, damaged, of an earlier release, or another
program's: what cannot be used is left out, and said in a line. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import untrusted
from ..errors import AFLoRAError
from .typed import as_json, finite, integer, number, text, typed

CONFIG, METRICS, FREEZE_LOG, RESULT = "config.yaml", "metrics.jsonl", "freeze_log.jsonl", "result.json"
_NOT_SETTING = ("run", "profile")  # sections of config.yaml that say nothing about the training
_DECIDE = ("keep_best", "patience", "eval_every")  # of section run: which of the weights are the result
_LONGEST_CONFIG, _MOST_NODES = 200_000, 10_000  # bytes, and values in it; of a run it has a few thousand bytes
_LONGEST_RECORD = 2**30  # bytes of a log


def dumps(record: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(finite(record), indent=indent, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """Read JSON, also with the NaN and Infinity of lenient writers: they become None. A ValueError if it is none."""
    return untrusted.load_json(text, parse_constant=lambda _: None, parse_float=lambda digits: number(float(digits)))


@dataclass(frozen=True)
class Update:
    """A line of metrics.jsonl; what is None was not measured, or not yet by the release that wrote it."""

    step: int
    epoch: float | None
    loss: float | None
    lr: float | None
    head_lr: float | None
    grad_norm: float | None
    trainable_params: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    mfu: float | None


@dataclass(frozen=True)
class Event:
    """A line of freeze_log.jsonl: what froze after which step, and the scores of all that were ranked."""

    step: int
    frozen: list[str]
    scores: dict[str, float]
    backward_from: int | None


@dataclass(frozen=True)
class Result:
    """result.json; what is None, or empty, was not measured, or not yet by the release that wrote it.

    Attributes:
        metrics: Of what adapter/ holds; None: not a number.
        evaluations: After each epoch, or every run.eval_every updates.
        last_epoch, best_epoch: After how many epochs the last was, and the one whose adapter was kept (None: the last).

        labels: Class names by number, of a classifier.
        traces: Relative to the run's directory.
        base_weights: What `fingerprint.of_weights` says of the model that was trained.
    """

    task: str
    method: str | None
    metrics: dict[str, float | None]
    evaluations: list[dict[str, float | None]]
    last_epoch: float | None
    best_epoch: float | None

    engine: str | None
    mixed_precision: str | None
    world_size: int | None
    steps: int | None
    labels: list[str]
    train_examples: int | None
    train_seconds: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    mfu: float | None
    avg_trainable_params: float | None
    head_params: int | None
    lora_r8_trainable_params: int | None
    freezable_matrices: int | None
    frozen_matrices: int | None
    freeze_events: int | None
    freeze_seconds_total: float | None
    traces: list[str]
    base_weights: str | None


@dataclass(frozen=True)
class Settings:
    """config.yaml of a run.

    Attributes:
        values: Everything that says what was trained: neither where the run went nor its seed.
    """

    model: str
    task: str
    epochs: float | None
    seed: int | None
    values: dict[str, Any]


def as_result(record: Any) -> Result:
    """What result.json holds, typed; a ValueError if it is not a run's result."""
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise ValueError("it holds no metrics")
    told = [(which, record.get(which)) for which in ("last", "best")]
    chosen = {f"{which}_{key}": value for which, part in told if isinstance(part, dict) for key, value in part.items()}
    return typed(Result, {**record, **chosen, "task": record.get("task", "?")})


class Run:
    """What a run's directory holds so far; the run may still be going on.

    Attributes:
        problems: What was left out, and why: a line each.
        done: How many updates there have been, as far as the logs tell.

    Raises:
        AFLoRAError: It is not a run's directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.settings = self._settings()
        self.metrics: list[Update] = []
        self.events: list[Event] = []
        for at, line in self._lines(METRICS):
            self.metrics.append(typed(Update, {**line, "step": at}))
        for at, line in self._lines(FREEZE_LOG):
            self.events.append(typed(Event, {**line, "step": at}))
        self.done = 1 + max([line.step for line in self.metrics] + [event.step for event in self.events], default=-1)
        self.result = read_result(path, self.problems)

    def _settings(self) -> Settings:
        if not os.path.exists(self.path):
            raise AFLoRAError(f"There is no folder {self.path}.")
        if not os.path.exists(self.path / CONFIG):
            what = "a run's directory: it has no config.yaml" if self.path.is_dir() else "a folder"
            raise AFLoRAError(f"{self.path} is not {what}. Name what was run.dir.")
        settings = read_settings(self.path)
        if settings is None:
            raise AFLoRAError(
                f"{self.path} is not a run's directory: its config.yaml is another program's (it names no model.name, "
                f"data.task and train). Name what was run.dir."
            )
        return settings

    def _lines(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The step and the whole of each line; half a line at the end is being written, or of a killed process."""
        path = self.path / name
        lines = _bytes(path, self.problems).split(b"\n")
        damaged = []
        for row, line in enumerate(lines, 1):
            try:
                record = loads(line) if line.strip() else None
            except ValueError:
                if row < len(lines):  # it ended with a line break: it was written whole
                    damaged.append(row)
                continue
            if record is None:
                continue
            step = integer(record.get("step")) if isinstance(record, dict) else None
            if step is None or step < 0:
                damaged.append(row)
            else:
                yield step, record
        if damaged:
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            self.problems.append(f"{path}: line {damaged[0]}{more} cannot be read and is left out.")

    @property
    def names(self) -> list[str]:
        """All matrices that were ranked at some time, in the model's order; not what froze with a block."""
        ranked = dict.fromkeys(name for event in self.events for name in event.scores)
        return list(ranked or dict.fromkeys(name for event in self.events for name in event.frozen))

    @property
    def frozen(self) -> dict[str, int]:
        ranked = {*self.names}
        return {name: event.step for event in self.events for name in event.frozen if name in ranked}

    @property
    def score(self) -> str:
        """What freezing.score is; runs of before it was an option have the paper's."""
        freezing = self.settings.values.get("freezing")
        return str(freezing.get("score", "gradient")) if isinstance(freezing, dict) else "gradient"

    @property
    def total_steps(self) -> int:
        """T; while the run goes on, as far as its learning rate's epochs tell."""
        done = max(self.done, 1)
        if self.result is not None and self.result.steps is not None:
            return max(self.result.steps, done)
        if most := integer(self.settings.values["train"].get("max_steps")):
            return max(most, done)
        last, epochs = self.metrics[-1] if self.metrics else None, self.settings.epochs
        if last is None or not last.epoch or not epochs or not 0 < epochs / last.epoch < 1e6:
            return done
        return max(round((last.step + 1) / last.epoch * epochs), done)


@dataclass(frozen=True)
class Outcome:
    """What a run came to, read without its logs.

    The marks are what a copy of the run shares with it, and no other run: measured times are in them.

    Attributes:
        result: None: it has not ended, or its result cannot be read.
        result_mark: Of result.json; None: there is none.
        log_mark: Of the first line of metrics.jsonl; None: there is none.
    """

    path: Path
    settings: Settings
    result: Result | None
    result_mark: str | None
    log_mark: str | None

    def is_copy_of(self, other: Outcome) -> bool:
        """Whether both are one training. One that was copied before its end has no result."""
        if self.settings.seed != other.settings.seed:
            return False
        if self.result is not None and other.result is not None:
            return self.result_mark == other.result_mark
        return self.log_mark is not None and self.log_mark == other.log_mark


def read_outcome(path: Path, problems: list[str]) -> Outcome | None:
    """What the run in this directory came to; None: it is none, which is a problem only where it looks like one."""
    try:
        settings = read_settings(path)
    except AFLoRAError as error:
        problems.append(str(error))
        return None
    if settings is None:
        if os.path.exists(path / METRICS) and os.path.exists(path / FREEZE_LOG):
            problems.append(f"{path} has a run's logs, but its config.yaml is not a run's; it is left out.")
        return None
    result = read_result(path, problems)
    first, ended, _ = _bytes(path / METRICS, problems, 1_000_000).partition(b"\n")
    result_mark = None if result is None else hashlib.sha256(repr(result).encode(errors="replace")).hexdigest()
    return Outcome(path, settings, result, result_mark, hashlib.sha256(first).hexdigest() if ended else None)


def read_config(path: Path) -> Any:
    """config.yaml in a folder, whatever it holds; an AFLoRAError says where it cannot be read."""
    file = path / CONFIG
    try:
        if not file.is_file() and os.path.exists(file):
            raise AFLoRAError(f"{file} is not a file.")
        content, loader = file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        untrusted.refuse_deep_yaml(content, loader)
        return yaml.load(content, loader)
    except AFLoRAError:
        raise
    except OSError as error:
        raise AFLoRAError(f"{file} could not be read: {error.strerror or error}.") from None
    except Exception as error:  # PyYAML lets through whatever its constructors raise
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise AFLoRAError(f"{file}{where}: this is not YAML that can be read: {said[:200]}.") from None


def read_settings(path: Path) -> Settings | None:
    """config.yaml in a folder; None: it is there, but not a run's. An AFLoRAError if it cannot be read."""
    try:
        if (path / CONFIG).stat().st_size > _LONGEST_CONFIG:
            return None
    except OSError:
        pass  # said by who reads it
    config = read_config(path)
    if not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in ("model", "data", "train")):
        return None
    model, task, train = text(config["model"].get("name")), text(config["data"].get("task")), config["train"]
    if model is None or task is None:
        return None
    try:
        run = config.get("run")
        told = {f"run.{key}": run[key] for key in _DECIDE if run.get(key) is not None} if isinstance(run, dict) else {}
        values = as_json({k: v for k, v in config.items() if k not in _NOT_SETTING} | told, [_MOST_NODES])
    except ValueError:
        return None
    values["train"].pop("seed", None)
    return Settings(model, task, number(train.get("epochs")), integer(train.get("seed")), values)


def read_result(path: Path, problems: list[str]) -> Result | None:
    """result.json in a folder; None: there is none, or it cannot be read, which is a problem."""
    file = path / RESULT
    if not os.path.exists(file):
        return None
    found: list[str] = []
    content = _bytes(file, found)
    problems += [f"{problem} The run counts as unfinished." for problem in found]
    if found:
        return None
    try:
        return as_result(loads(content))
    except ValueError as error:
        problems.append(f"{file} is cut or damaged ({error}). The run counts as unfinished.")
    return None


def _bytes(path: Path, problems: list[str], most: int = -1) -> bytes:
    try:
        if not os.path.exists(path):
            return b""
        if not path.is_file():
            raise OSError("it is not a file")
        if most < 0 and path.stat().st_size > _LONGEST_RECORD:
            raise OSError(f"it has more than {_LONGEST_RECORD >> 20} MiB")
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        problems.append(f"{path} could not be read: {error.strerror or error}.")
        return b""
