"""Experiment trackers besides TensorBoard: accelerate's own, on the main process only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AFLoRAError, one_line, writing
from ..extras import installed
from ..store.records import dumps, loads

TENSORBOARD = "tensorboard"
# As accelerate calls them, which are the names of the packages, too.
NAMES = (TENSORBOARD, "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
FOLDER = "trackers"  # in the run's directory
_PROJECT = "aflora"
_IDS = "ids.json"
# Trackers are called between updates: a server that does not answer is to be given up before other ranks lose patience,
# which with NCCL is after ten minutes. Whoever sets these variables decides.
_LIMITS = {
    "WANDB_FINISH_TIMEOUT": "60",  # seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise for a tracker that there is not, that is named twice, or whose package is not installed."""
    for name in names:
        if names.count(name) > 1:
            raise AFLoRAError(f"run.trackers names {name} twice: name it once.")
        if name not in NAMES:
            raise AFLoRAError(f"run.trackers names {name!r}. Trackers: {', '.join(NAMES)}.")
        if not installed(name):
            raise AFLoRAError(
                f"run.trackers names {name}, which is not installed. Install it (pip install {name}), or leave it out "
                f"of run.trackers."
            )


class Tracker:
    """One of accelerate's trackers. Its methods raise whatever its library and its network come to.

    Args:
        name: As accelerate calls it.
        run: The run's directory. Under `trackers/` in it the tracker's own files go where they can, and stays by which
            name the tracker knows the run, so that a resumed run goes on there.
        hyperparameters: Told to the tracker of a run that it does not know yet.

    Raises:
        AFLoRAError: It does not start.
    """

    survived = Exception  # what ends the tracker, and not the training

    def __init__(self, name: str, run: Path, hyperparameters: Mapping[str, bool | int | float | str]) -> None:
        self.name, self._run = name, run.absolute()
        try:
            self._tracker = self._start(hyperparameters)
        except Exception as error:
            raise AFLoRAError(
                f"The tracker {name} did not start: {one_line(error)}. Fix that, or leave {name} out of run.trackers; "
                f"the run goes on with --resume."
            ) from error

    def complaint(self, error: Exception) -> str:
        return f"the tracker {self.name} has failed ({one_line(error)}); training goes on without it."

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from ..compat.accelerate import log  # not for a command line that is only read

        log(self._tracker, dict(values), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """As a table of one cell, where accelerate knows a way."""
        if hasattr(self._tracker, "log_table"):
            self._tracker.log_table(tag, columns=["text"], data=[[markdown]], step=step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """As an image, or as a file of the run: with those of which it is known that they take matplotlib's."""
        if self.name == "wandb":
            self._tracker.log_images({tag: [figure]}, step=step)
        elif self.name == "mlflow":
            self._tracker.log_figure(figure, f"{tag}/step_{step:08d}.png")

    def close(self) -> None:
        try:
            self._tracker.finish()
        finally:
            if self.name == "mlflow":
                self._release_mlflow()

    def _start(self, hyperparameters: Mapping[str, Any]) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        from ..compat.accelerate import store_configuration

        folder = self._run / FOLDER
        ids = _read_ids(folder)
        with writing("What trackers keep", folder):
            folder.mkdir(exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", _PROJECT) if self.name == "wandb" else _PROJECT
        if self.name == "mlflow":
            self._point_mlflow()
        for variable, value in _LIMITS.items():
            os.environ.setdefault(variable, value)
        kind: Any = LOGGER_TYPE_TO_CLASS[self.name]
        where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(project, **where, **self._options(ids.get(self.name)))
        tracker.start()
        if ids.get(self.name) is None:
            store_configuration(tracker, dict(hyperparameters))
            if (known_as := self._known_as(tracker)) is not None:
                with writing("By what a tracker knows the run", folder):
                    (folder / _IDS).write_text(dumps({**ids, self.name: known_as}, indent=2) + "\n", encoding="utf-8")
        return tracker

    def _options(self, known_as: str | None) -> dict[str, Any]:
        """Where the tracker's files go, what it calls the run, and which run it goes on with."""
        folder, run_name = self._run / FOLDER, self._run.name
        if self.name == "wandb":
            where = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
            return {**where, "name": run_name, **({"id": known_as, "resume": "allow"} if known_as else {})}
        if self.name == "mlflow":
            return {"run_name": run_name, "run_id": known_as}
        if self.name == "trackio":  # knows a run by its name
            return {"name": known_as or f"{run_name}-{secrets.token_hex(3)}", "resume": "allow"}
        return {"dir": str(folder / self.name)} if self.name == "dvclive" else {}

    def _known_as(self, tracker: Any) -> str | None:
        """By which a later process finds the same run of the tracker; None: each process makes a new one."""
        if self.name == "wandb":
            return str(tracker.tracker.id)
        if self.name == "mlflow":
            return str(tracker.tracker.info.run_id)
        return str(tracker.tracker.name) if self.name == "trackio" else None

    def _point_mlflow(self) -> None:
        """Have MLflow write files into the run's directory, unless a server or another place is named."""
        import mlflow

        if not mlflow.is_tracking_uri_set():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since 3.11 it wants to be told
            mlflow.set_tracking_uri((self._run / FOLDER / "mlflow").as_uri())

    def _release_mlflow(self) -> None:
        """Let the next run in this process choose anew."""
        import mlflow

        if mlflow.get_tracking_uri() == (self._run / FOLDER / "mlflow").as_uri():
            mlflow.set_tracking_uri(None)


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        ids = loads((folder / _IDS).read_bytes())
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}
