"""A run's directory: what is written where, as a contract that other tools read.

Only the main process writes. JSON lines are flushed line by line, so a run that ends early leaves
whole lines behind.
"""

from __future__ import annotations

import os
import shutil
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from accelerate import Accelerator

from ..errors import AFLoRAError, writing
from ..options import Config, RunConfig
from ..processes import on_main
from .checkpoint import list_abandoned, list_checkpoints, step_of
from .lock import LOCK, refuse_another, this_job, try_lock
from .records import CONFIG, FREEZE_LOG, METRICS, RESULT, dumps, loads, read_config

# Everything that a run writes; `overwrite` deletes these and nothing else.
_FILES = (CONFIG, FREEZE_LOG, METRICS, RESULT)
LORA = "lora"
_FOLDERS = ("checkpoints", "adapter", LORA, "tensorboard", "trackers")
_PUT_ASIDE = (FREEZE_LOG, METRICS, "adapter", LORA, RESULT)  # of a finished run, when it is taken up: as abandoned_NAME
_ASIDE = tuple(f"abandoned_{name}" for name in _PUT_ASIDE)


@dataclass(frozen=True)
class GoingOn:
    """Where a run is taken up: at this checkpoint after `step` updates, with these lines of freeze_log.jsonl so far."""

    checkpoint: Path
    step: int
    events: list[dict[str, Any]]


def written(config: RunConfig, adapter: bool = True, freezes: bool = True) -> list[str]:
    """What a run of this configuration leaves in its directory: of an adapter or a model; with freezes or without."""
    there = {
        FREEZE_LOG: freezes,
        LORA: adapter,
        "checkpoints": config.save_every != 0,
        "tensorboard": "tensorboard" in config.trackers,
        "trackers": bool({*config.trackers} - {"tensorboard"}),
    }
    files = [name for name in _FILES if there.get(name, True)]
    return [*files, *(f"{name}/" for name in _FOLDERS if there.get(name, True))]


def refuse_taken(config: RunConfig) -> None:
    """Raise an AFLoRAError unless a run may begin, or go on, in its directory."""
    path = Path(config.dir)
    if path.exists() and not path.is_dir():
        raise AFLoRAError(f"run.dir={path} is a file. Name a folder.")
    there = next(at for at in (path, *path.absolute().parents) if at.exists())
    if not path.exists() and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise AFLoRAError(f"run.dir={path} cannot be made: {there} is no folder that may be written to. Name another.")
    if _written_by_hand(path):
        raise AFLoRAError(
            f"{path / CONFIG} is there, and no run has written it: a run writes its own of that name. Put yours "
            f"elsewhere, or name another folder with run.dir."
        )
    held = [name for name in (*_FILES, *_FOLDERS) if _holds_any(path / name)]
    goes_on = config.resume is not None and (
        config.resume == "last" or Path(config.resume).resolve().parent == (path / "checkpoints").resolve()
    )
    if held and not config.overwrite and not goes_on:
        raise AFLoRAError(
            f"{path} already holds a run ({', '.join(held)}). Name another folder with run.dir, go on "
            f"with that run (--resume), or replace it with run.overwrite=true."
        )


def _written_by_hand(path: Path) -> bool:
    """Whether the config.yaml in a folder sets options, and is no run's: one of a run says all, these two as well."""
    try:
        config = read_config(path) if (path / CONFIG).exists() else None
    except AFLoRAError:  # damaged
        return False
    run = config.get("run") if isinstance(config, dict) else {"overwrite": False, "resume": None}
    return not (isinstance(run, dict) and {"overwrite", "resume"} <= run.keys())


def refuse_own_input(config: Config, files: Sequence[str] = ()) -> None:
    """Raise AFLoRAError where run.overwrite would delete what the run reads: the model of the run that was there.

    Args:
        files: Of options, that were read. Whose config.yaml the folder's own is, `refuse_taken` knows.
    """
    if not config.run.overwrite:
        return
    data, folder = config.data, Path(config.run.dir)
    gone = [folder.resolve() / name for name in (*_FILES, *_FOLDERS, *_ASIDE)]  # of a link the link alone
    read = [config.model.name, data.path, data.name, data.train_file, data.validation_file, *data.mix]
    read += [file for file in files if Path(file).resolve() != folder.resolve() / CONFIG]
    for name in filter(None, read):
        at = os.path.expanduser(name)
        paths = [path for path in map(Path, (at, at.partition(":")[0])) if path.exists()]  # FOLDER:SUBSET
        places = [place for path in paths for place in (path.resolve(), Path(os.path.abspath(path)))]  # through a link
        if any(place.is_relative_to(old) for place in places for old in gone):
            raise AFLoRAError(
                f"run.overwrite=true would delete {name}, which this run reads. Name another folder with run.dir, or "
                f"move that away first."
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # what a link leads to is the user's
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _holds_any(path: Path) -> bool:
    """Whether something is there, and no empty folder."""
    try:
        return path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError:  # it cannot be looked into
        return True


def _stays(path: Path) -> bool:
    """Whether a folder is left where a run begins anew: a link to an empty one, as on a faster disk, is the run's.

    Among checkpoints the user's own copies may lie; of what else a link leads to the run's part is not known.
    """
    if path.name == "checkpoints" and path.is_dir():
        return path.is_symlink() or _holds_any(path)
    return path.is_symlink() and path.is_dir() and not _holds_any(path)


class RunDirectory:
    """The directory of one run. Looked at when created; nothing changes in it before `claim`.

    Args:
        config: Which directory, and whether to replace the run in it.

    Attributes:
        stop_file: Its existence asks a running job to save and leave.

    Raises:
        AFLoRAError: On every rank, if the directory holds (part of) a run already.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.path = path = Path(config.dir)
        self.checkpoints, self.adapter, self.tensorboard = path / "checkpoints", path / "adapter", path / "tensorboard"
        self.stop_file = path / "stop"
        self.accelerator = accelerator
        self.writes = accelerator.is_main_process
        refuse_taken(config)
        self._found = self._owner()
        # launch/slurm/job.sh has removed the one of before; its signal may come while Python still starts.
        self._stale_stop = None if os.environ.get("AFLORA_STOP_CLEARED") else _identity(self.stop_file)
        self._lock: IO[str] | None = None
        self.failure: str | None = None  # why nothing more can be written

    def claim(self, resolved: str, *, going_on: GoingOn | None) -> None:
        """Make the directory this run's own, until this process ends, however it ends. A collective.

        Writes config.yaml and deletes what an earlier run left there; when going on, what it did later.

        Args:
            resolved: The whole configuration as YAML.
            going_on: Where an earlier process is continued; None: from the beginning.

        Raises:
            AFLoRAError: On every rank, if another job is at work here, or the directory cannot be written.
        """
        self.accelerator.wait_for_everyone()  # all ranks have looked before one of them writes

        def take() -> None:
            with writing("The run", self.path, "Name another folder with run.dir."):
                self._take_lock()
                if self._owner() != self._found:  # it was looked at minutes ago, before this job had the lock
                    raise AFLoRAError(
                        f"Another job has begun or ended a run in {self.path} since this one was started. Look at what "
                        f"is there; then go on with it (--resume), or name another folder with run.dir."
                    )
                self._prepare(resolved, going_on)

        on_main(self.accelerator, take)

    def kept_if_begun_anew(self) -> list[str]:
        """What lies here that took a training, or is not a run's: to begin anew would delete it."""
        names = [*_FOLDERS, *_ASIDE]
        if (self.path / CONFIG).exists():  # else nothing says that a run wrote these
            names = [name for name in names if name not in ("tensorboard", "trackers")]
        held = [name for name in names if name != "checkpoints" and _holds_any(self.path / name)]
        if self.checkpoints.is_dir():
            found = sorted(path.name for path in self.checkpoints.iterdir() if not path.name.startswith(".step_"))
            held += [f"checkpoints/{name}" for name in found]
        return held

    def _owner(self) -> list[tuple[int, int] | None]:
        """Tells runs in this directory apart: each writes its configuration anew when it begins or is taken up."""
        return [_identity(self.path / name) for name in (CONFIG, RESULT)]

    def _take_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        # A POSIX lock ends with its process, kill -9 included, and holds across the nodes of a shared file system.
        self._lock = (self.path / LOCK).open("a+", encoding="utf-8")
        weakref.finalize(self, self._lock.close)
        job = os.environ.get("SLURM_JOB_ID")
        # The lock of a node that broke down may live on for a while.
        patience = time.monotonic() + (120 if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else 0)
        while not try_lock(self._lock):
            if time.monotonic() < patience:
                time.sleep(2)
                continue
            self._lock.seek(0)
            holder = self._lock.read().strip() or "it does not say which"
            if job and holder.endswith(f"Slurm job {job}"):
                raise AFLoRAError(
                    f"Another task of this same Slurm job is at work in {self.path}: {holder}. Each task trains alone "
                    f"where srun starts several of them without a launcher that joins them: start one launcher a node "
                    f"(srun --ntasks-per-node=1, as launch/slurm does), which starts the ranks."
                )
            raise AFLoRAError(
                f"Another job is at work in {self.path}: {holder}. Wait for its end, or name another folder with "
                f"run.dir."
            )
        self._lock.truncate(0)
        self._lock.write(f"{this_job()}\n")
        self._lock.flush()

    def _prepare(self, resolved: str, going_on: GoingOn | None) -> None:
        for unfinished in (*self.checkpoints.glob(".step_*"), *self.path.glob(".trace_*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        if self._stale_stop is not None and _identity(self.stop_file) == self._stale_stop:
            self.stop_file.unlink()
            print(f"aflora: {self.stop_file} was there before this start: it is removed, and does not stop this one.")
        if going_on is None:
            for name in reversed(_FILES):  # the result first: a killed process must not look finished
                (self.path / name).unlink(missing_ok=True)
            for old in (*list_checkpoints(self.checkpoints), *list_abandoned(self.checkpoints)):
                _remove(old)
            for name in (*_FOLDERS, *_ASIDE):
                if not _stays(self.path / name):
                    _remove(self.path / name)
        else:
            if (self.path / RESULT).exists():
                self._put_aside()
            else:
                _remove(self.path / LORA)  # of a result that was deleted; what serves is made of adapter/
            self._abandon(going_on)
            self._replace(FREEZE_LOG, "".join(dumps(event) + "\n" for event in going_on.events))
            self._cut(METRICS, going_on.step)
        if "tensorboard" in self.config.trackers:
            self.tensorboard.mkdir(exist_ok=True)
        self._replace(CONFIG, resolved)

    def _put_aside(self) -> None:
        """Keep what a finished run came to: it is continued from one of its checkpoints, to another end."""
        for name, other in zip(_PUT_ASIDE, _ASIDE, strict=True):
            path, aside = self.path / name, self.path / other
            if not path.exists():
                continue
            if path.suffix == ".jsonl":  # its first part is the new run's, too
                shutil.copyfile(path, aside)
            else:
                _remove(aside)
                path.replace(aside)

    def _abandon(self, going_on: GoingOn) -> None:
        """Put checkpoints of later steps aside: what follows now is another branch, or they are damaged.

        Those that an earlier branch left aside go then, but for the one that is read now.
        """
        later = [path for path in list_checkpoints(self.checkpoints) if step_of(path) > going_on.step]
        if later:
            for old in list_abandoned(self.checkpoints):
                if old.resolve() != going_on.checkpoint.resolve():
                    _remove(old)
        for path in later:
            path.replace(path.with_name(f"abandoned_{path.name}"))

    def _cut(self, name: str, steps: int) -> None:
        """Drop the lines of updates that will be done again, and half a line of a process that was killed."""
        path = self.path / name
        kept = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                record = loads(line)
                if record["step"] < steps:
                    kept.append(dumps(record) + "\n")
            except (ValueError, TypeError, KeyError):  # one that is damaged takes no other with it
                continue
        self._replace(name, "".join(kept))

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def refuse_another(self) -> None:
        """Raise an AFLoRAError where another job has begun in the place of this directory, which was moved since."""
        if self._lock is not None:
            refuse_another(self.path, self._lock)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to freeze_log.jsonl or metrics.jsonl.

        What cannot be written (a full disk) is kept in `failure`, for all ranks to end at their next exchange: this is
        called in the middle of an update, where an error of the main process would leave the others waiting.
        """
        if not self.writes or self.failure is not None:
            return
        try:
            self.refuse_another()
            with (
                writing(name, self.path, "Make room, then --resume."),
                (self.path / name).open("a", encoding="utf-8") as file,
            ):
                file.write(dumps(line) + "\n")
        except AFLoRAError as error:
            self.failure = str(error)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, by which a run is known to have ended. A collective."""

        def write() -> None:
            with writing(RESULT, self.path, "Make room, then --resume."):
                self.refuse_another()
                self._replace(RESULT, dumps(result, indent=2) + "\n")

        on_main(self.accelerator, write)
