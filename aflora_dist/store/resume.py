"""Taking up a training where a checkpoint left it, and leaving such checkpoints."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from ..control import Progress
from ..errors import AFLoRAError, DivergedError, writing
from ..methods import Control
from ..notices import logger
from ..options import Config, changes_nothing, flat
from ..processes import on_main
from ..version import __version__
from . import checkpoint, records
from .checkpoint import Checkpoint
from .parts import LearningRates, Randomness
from .rundir import GoingOn, RunDirectory

LABELS = "labels"  # told as they are, where all else is told by a fingerprint
# May be lowered where a training diverged.
RATES = {"train.learning_rate", "train.head_learning_rate", "train.vector_learning_rate"}
_WHERE = {"model.name", "model.revision"}  # may have been moved, where the weights tell that it is the same


def find(run: RunDirectory, resolved: str, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint that run.resume asks for; None: start from the beginning. A collective.

    Only the main process reads and checks the file: the other ranks have an empty `tensors`.

    Raises:
        AFLoRAError: On every rank: it is damaged, or of a run with another configuration.
    """
    if run.config.resume is None:
        return None

    def choose() -> Checkpoint | None:
        if (chosen := _choose(run)) is not None:
            data = chosen.training["data"]
            known = isinstance(data, dict) and data.get("base weights") is not None
            but = RATES | _WHERE if known else RATES
            refuse_differences(chosen.training["config"], yaml.safe_load(resolved), str(chosen.path), but)
        return chosen

    return checkpoint.read_on_main(accelerator, choose)


def finished(run: RunDirectory, resolved: str) -> dict[str, Any] | None:
    """The result of the run, if it has ended already and its last checkpoint is to be resumed. A collective.

    One that ended for want of patience has not, where there is more of it now: it goes on from its last checkpoint.

    Raises:
        AFLoRAError: It ended with another configuration.
    """

    def look() -> dict[str, Any] | None:
        if run.config.resume != "last" or not (run.path / records.RESULT).exists():
            return None
        config = records.read_config(run.path)
        if not isinstance(config, dict):
            raise AFLoRAError(f"{run.path / records.CONFIG} is not a run's configuration.")
        refuse_differences(config, yaml.safe_load(resolved), str(run.path))
        file = run.path / records.RESULT
        try:
            result = records.loads(file.read_bytes())
            records.as_result(result)
        except ValueError as error:
            raise AFLoRAError(
                f"{file} is cut or damaged ({error}). Delete it, and the same command goes on from the last checkpoint."
            ) from None
        return None if _goes_on(run, config, result) else result

    return on_main(run.accelerator, look)


def _goes_on(run: RunDirectory, theirs: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a run that ended early waits longer now; says what will be."""
    said = flat(theirs)
    before, now = said.get("run.patience"), run.config.patience
    done, epochs = result.get("last", {}).get("epoch", len(result.get("evaluations", ()))), said.get("train.epochs", 0)
    ended_whole = result.get("steps", 0) >= said["train.max_steps"] if said.get("train.max_steps") else done >= epochs
    if before == now:
        return False
    ended = f"The run in {run.path} ended after epoch {done:g} of {epochs} with run.patience={before}"
    goes_on = False
    if before is None or ended_whole:
        ended = f"The run in {run.path} has ended: run.patience={now} changes nothing of it"
    elif now is None or now < before:
        ended = f"{ended}. It goes on with a higher one"
    elif checkpoint.newest_good(run.checkpoints)[0] is None:
        ended = f"{ended}, and left no checkpoint to go on from with run.patience={now}"
    else:
        ended, goes_on = f"{ended} and goes on with run.patience={now}", True
    print(f"{ended}.", flush=True)
    return goes_on


def _choose(run: RunDirectory) -> Checkpoint | None:
    assert run.config.resume is not None
    if run.config.resume != "last":
        path = Path(run.config.resume)
        if not path.is_dir():
            raise AFLoRAError(f"run.resume={path} is not a checkpoint's folder.")
        if (path / "checkpoints").is_dir():
            raise AFLoRAError(
                f"run.resume={path} is a run. --run.dir {path} --resume goes on from its newest checkpoint, "
                f"--resume {path}/checkpoints/step_... from one of them."
            )
        loaded = checkpoint.load(path)
        _refuse_twin(run.checkpoints, loaded)
        return loaded
    newest, complaints = checkpoint.newest_good(run.checkpoints)
    if newest is None and (held := run.kept_if_begun_anew()):
        raise AFLoRAError(
            " ".join(complaints) + f" {run.path} holds no checkpoint of a run (step_...) to go on from, and to begin "
            f"anew would delete {', '.join(held[:5])}{' and more' if len(held) > 5 else ''}. Name a checkpoint with "
            f"--resume FOLDER, move away what you need, or begin again with run.overwrite=true."
        )
    if newest is None:  # and nothing damaged, which would be deleted
        return None
    for complaint in complaints:
        logger.warning(f"{complaint} Going on from {newest.path.name}.")
    return newest


def _refuse_twin(folder: Path, chosen: Checkpoint) -> None:
    """Raise an AFLoRAError where the run holds another branch's checkpoint of that step: a stop would lead to it."""
    twin = folder / f"step_{chosen.training['progress']['step']:08d}"
    with suppress(OSError):  # of one without a manifest nobody would
        if twin.is_dir() and not checkpoint.are_one(twin, chosen.path):
            raise AFLoRAError(
                f"{twin} is of another branch of this run than {chosen.path}, after the same step: from it a later "
                f"--resume would go on. Move it out of {folder}, and the same command goes on from {chosen.path.name}."
            )


def refuse_differences(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], where: str, but: Collection[str] = ()
) -> None:
    """Raise AFLoRAError unless both configurations, `but` for these options, train one model on the same batches."""
    different = [
        f"{key} is {there} there and {here} here"
        for key, (there, here) in _differences(theirs, mine).items()
        if key not in but and not changes_nothing(key)
    ]
    if different:
        raise AFLoRAError(f"{where} is of a run with another configuration: {'; '.join(different)}.")


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options with both values, where they differ."""
    # An earlier release lacks the newer options: it did what they do if they are not given.
    there, here = flat(asdict(Config())) | flat(theirs), flat(mine)
    return {k: (there.get(k), here.get(k)) for k in sorted({*there, *here}) if there.get(k) != here.get(k)}


class Checkpointer:
    """Saves a training's state and restores it.

    Args:
        data: What must not change between a run and its continuation: name -> fingerprint (of LABELS the class names,
            as JSON); None: not known.
        resolved: The configuration as YAML.
    """

    def __init__(
        self,
        run: RunDirectory,
        accelerator: Accelerator,
        progress: Progress,
        scheduler: LambdaLR,
        data: Mapping[str, str | None],
        resolved: str,
    ) -> None:
        self.run, self.accelerator, self.progress, self.scheduler = run, accelerator, progress, scheduler
        self.data, self.resolved = dict(data), resolved
        self.randomness = Randomness(accelerator)
        self._begun_at: Path | None = None  # the checkpoint that was gone on from
        progress.parts |= {"scheduler": LearningRates(scheduler), "randomness": self.randomness}

    def save(self) -> float:
        """Write a checkpoint; returns the seconds that it took. A collective.

        Raises:
            AFLoRAError: On every rank, if it cannot be written; those before it are unharmed.
            DivergedError: On every rank, if a loss, a value or a moment is not finite; nothing is written then.
        """
        began = time.perf_counter()
        tensors, record = self.progress.snapshot()
        training = {
            "progress": record,
            "data": self.data,
            "config": yaml.safe_load(self.resolved),
            "world_size": self.accelerator.num_processes,
            "versions": {"aflora_dist": __version__, **{n: version(n) for n in ("torch", "peft", "accelerate")}},
        }

        def write() -> None:
            folder, then = self.run.checkpoints, "What was saved before is unharmed; make room, then --resume."
            with writing("A checkpoint", folder, then):
                self.run.refuse_another()
                checkpoint.save(folder, self.progress.step, tensors, training, self.run.config.keep)

        on_main(self.accelerator, write)
        self.progress.engine.settle()
        return time.perf_counter() - began

    @contextmanager
    def guarding(self, control: Control) -> Iterator[None]:
        """A training, which may break down: a diverged one is told where to go on, and no second complaint follows."""
        try:
            yield
        except BaseException as error:
            control.interrupted()
            if not isinstance(error, DivergedError):
                raise
            saved = checkpoint.list_checkpoints(self.run.checkpoints)
            how = "Nothing had been saved before: begin again with run.overwrite=true, and save more often."
            if saved and (self._begun_at is None or saved[0].resolve() != self._begun_at.resolve()):
                how = f"What was saved is of before: the same command with --resume goes on from {saved[0]}."
            elif saved:
                earlier = f" go on from the one before, with --resume {saved[1]}, or" if len(saved) > 1 else ""
                how = (
                    f"It went on from {saved[0]}, which is finite, and may be spoilt all the same: lower the rate "
                    f"still more,{earlier} begin again with run.overwrite=true."
                )
            raise DivergedError(f"{error} {how}") from None

    def claim(self, loaded: Checkpoint | None) -> int:
        """Make the run's directory this run's own; returns the first step to do. A collective.

        Nothing has changed in the directory until all that can be refused has been.

        Args:
            loaded: Where to go on; None: from the beginning.

        Raises:
            AFLoRAError: It is of another model, schedule, or training data; or as `RunDirectory.claim`.
        """
        if loaded is None:
            self.run.claim(self.resolved, going_on=None)
            return 0
        self._check_data(loaded)
        record = loaded.training["progress"]
        self.progress.check(record)
        events = record["parts"].get("freezing", {}).get("events", [])
        if self.run.writes:
            events = _with_scores(events, loaded.path.parent.parent / records.FREEZE_LOG)
        self.run.claim(self.resolved, going_on=GoingOn(loaded.path, record["step"], events))
        return record["step"]

    def _check_data(self, loaded: Checkpoint) -> None:
        there = loaded.training["data"]
        for name, here in self.data.items():
            if None not in (here, there.get(name)) and there[name] != here:
                if name == LABELS:
                    raise AFLoRAError(
                        f"{loaded.path} is of a run whose labels are {there[name]}, and those of the data that were "
                        f"loaded now are {here}. Go on with the data of then, or begin another run."
                    )
                raise AFLoRAError(
                    f"{loaded.path} is of a run on other {name} than what was loaded now. Go on with the original, or "
                    f"begin another run."
                )

    def restore(self, loaded: Checkpoint) -> None:
        """Bring everything to where the checkpoint was written. A collective."""
        training, self._begun_at = loaded.training, loaded.path
        self.progress.restore(loaded.tensors, training["progress"])
        if self.run.writes:
            before = f"{training['world_size']} x {training['progress']['kind']}"
            print(f"Going on after step {self.progress.step - 1}, from {loaded.path} ({before}).", flush=True)
            changed = _differences(training["config"], yaml.safe_load(self.resolved))
            precisions = training["progress"]["precision"], self.progress.precision
            if precisions[0] != precisions[1]:  # the launcher's, as the engine, and with DeepSpeed the base's dtype
                print(f"From here on --mixed_precision {precisions[1]}; it was {precisions[0]}.", flush=True)
            for key, (there, here) in changed.items():
                if key in RATES | _WHERE:
                    print(f"From here on {key}={here}; it was {there}.", flush=True)


def _with_scores(events: list[dict[str, Any]], log: Path) -> list[dict[str, Any]]:
    """Lines of freeze_log.jsonl: as the run has written them that left the checkpoint, where its log is still there."""
    written = {}
    for line in log.read_bytes().splitlines() if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError):  # cut, or not a run's
            found = records.loads(line)
            written[found["step"], *found["frozen"]] = found
    return [written.get((event["step"], *event["frozen"]), event) for event in events]
