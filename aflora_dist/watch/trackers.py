"""Experiment trackers besides TensorBoard, as accelerate drives them. On the main process only.

Each is fed from a thread of its own: what stalls or fails there holds up no rank and ends no training.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compat.accelerate import log, store_configuration
from ..errors import AFLoRAError, writing
from ..notices import logger

TENSORBOARD = "tensorboard"
# Name -> what pip installs; the names, which are those of the modules, are accelerate's.
PACKAGES = {
    TENSORBOARD: "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}
FOLDER = "trackers"  # in the run's directory
_PROJECT = "aflora"
_IDS = "ids.json"
_MOST_WAITING = 10_000  # calls that a tracker has not taken yet
_PATIENCE = 60.0  # seconds for what is left at the end

Call = Callable[[Any], Any]


def check(names: Sequence[str]) -> None:
    """Raise for a tracker that there is not, that is named twice, or whose package is not installed."""
    for name in names:
        if names.count(name) > 1:
            raise AFLoRAError(f"run.trackers names {name} twice: name it once.")
        if name not in PACKAGES:
            raise AFLoRAError(f"run.trackers names {name!r}. Trackers: {', '.join(PACKAGES)}.")
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as wandb makes, is no package
            raise AFLoRAError(
                f"run.trackers names {name}, which is not installed. Install it (pip install {PACKAGES[name]}), or "
                f"leave it out of run.trackers."
            )


class Tracker:
    """One of accelerate's trackers.

    Args:
        name: As accelerate calls it.
        run: The run's directory. Under `trackers/` in it the tracker's own files go where they can, and stays by which
            name the tracker knows the run, so that a resumed run goes on there.
        hyperparameters: Told to the tracker of a run that it does not know yet.

    Raises:
        AFLoRAError: It does not start.
    """

    def __init__(self, name: str, run: Path, hyperparameters: Mapping[str, bool | int | float | str]) -> None:
        self.name = name
        self._calls: queue.Queue[Call | None] = queue.Queue(_MOST_WAITING)
        self._failed = False
        started: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(
            target=self._work, args=(run.absolute(), hyperparameters, started), name=f"tracker {name}", daemon=True
        )
        self._thread.start()
        if (error := started.get()) is not None:
            raise AFLoRAError(
                f"The tracker {name} did not start: {_short(error)}. Mend that, or leave {name} out of run.trackers; "
                f"the run goes on with --resume."
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._tell(lambda tracker: log(tracker, dict(values), step))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """As a table of one cell, where accelerate knows a way."""

        def write(tracker: Any) -> None:
            if hasattr(tracker, "log_table"):
                tracker.log_table(tag, columns=["text"], data=[[markdown]], step=step)

        self._tell(write)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """As an image, or as a file of the run, where accelerate knows a way."""
        if self.name in ("wandb", "swanlab"):
            pixels = _pixels(figure)
            self._tell(lambda tracker: tracker.log_images({tag: [pixels]}, step=step))
        elif self.name == "mlflow":
            self._tell(lambda tracker: tracker.log_figure(figure, f"{tag}/step_{step:08d}.png"))

    def close(self) -> None:
        """Have it take in what it was told, for a minute at most."""
        self._tell(None)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive() and not self._failed:
            self._give_up(f"has not taken in everything after {_PATIENCE:g} seconds")

    def _tell(self, call: Call | None) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up("takes nothing in any more")

    def _give_up(self, why: str) -> None:
        self._failed = True
        logger.warning(f"the tracker {self.name} {why}; training goes on without it.")

    def _work(self, run: Path, hyperparameters: Mapping[str, Any], started: queue.Queue[Exception | None]) -> None:
        """The thread: all calls of a tracker, for some keep what is going on by thread."""
        try:
            tracker = _start(self.name, run, hyperparameters)
        except Exception as error:  # whatever a library and its network come to
            started.put(error)
            return
        started.put(None)
        try:
            while not self._failed and (call := self._calls.get()) is not None:
                call(tracker)
            tracker.finish()
        except Exception as error:
            self._give_up(f"has failed ({_short(error)})")
        finally:
            if self.name == "mlflow":
                _release_mlflow(run)


def _start(name: str, run: Path, hyperparameters: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder = run / FOLDER
    ids = _read_ids(folder)
    with writing("What trackers keep", folder):
        folder.mkdir(exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", _PROJECT) if name == "wandb" else _PROJECT
    if name == "mlflow":
        _point_mlflow(folder / "mlflow")
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](project, **_options(name, run, ids.get(name)))
    tracker.start()
    if ids.get(name) is None:
        store_configuration(tracker, dict(hyperparameters))
        if (known_as := _known_as(name, tracker)) is not None:
            _write_id(folder, name, known_as)
    return tracker


def _options(name: str, run: Path, known_as: str | None) -> dict[str, Any]:
    """How accelerate's tracker is made: where its files go, what it calls the run, and which run it goes on with."""
    folder = run / FOLDER
    if name == "wandb":
        where = {} if "WANDB_DIR" in os.environ else {"dir": str(folder)}
        return {**where, "name": run.name, **({"id": known_as, "resume": "allow"} if known_as else {})}
    if name == "mlflow":
        return {"run_name": run.name, "run_id": known_as}
    if name == "trackio":  # knows a run by its name
        return {"name": known_as or f"{run.name}-{secrets.token_hex(3)}", "resume": "allow"}
    if name == "aim":
        return {"logging_dir": str(folder)}
    return {"dir": str(folder / name)} if name == "dvclive" else {}


def _known_as(name: str, tracker: Any) -> str | None:
    """By which a later process finds the same run of the tracker; None: each process makes a new one."""
    if name == "wandb":
        return str(tracker.tracker.id)
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.name) if name == "trackio" else None


def _point_mlflow(folder: Path) -> None:
    """Have MLflow write files into the run's directory, unless a server or another place is named."""
    import mlflow

    if mlflow.is_tracking_uri_set():
        return
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since 3.11 it wants to be told
    mlflow.set_tracking_uri(folder.as_uri())


def _release_mlflow(run: Path) -> None:
    """Let the next run in this process choose anew."""
    import mlflow

    if mlflow.get_tracking_uri() == (run / FOLDER / "mlflow").as_uri():
        mlflow.set_tracking_uri(None)


def _read_ids(folder: Path) -> dict[str, str]:
    from ..store.records import loads

    try:
        ids = loads((folder / _IDS).read_bytes())
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}


def _write_id(folder: Path, name: str, known_as: str) -> None:
    from ..store.records import dumps

    with writing("By what a tracker knows the run", folder):
        (folder / _IDS).write_text(dumps({**_read_ids(folder), name: known_as}, indent=2) + "\n", encoding="utf-8")


def _pixels(figure: Any) -> Any:
    """A figure as an array (height, width, 4) of bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
