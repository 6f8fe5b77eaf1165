"""What the trackers of a run are told: the same to all, under the same names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import AFLoRAError
from ..names import matrix_position, stack_names
from ..notices import logger
from ..options import Config, flat
from ..traces import read_run, tables
from .trackers import TENSORBOARD, Tracker

if TYPE_CHECKING:
    from .tensorboard import TensorBoard

_COMPARED_RANKS = range(8)  # of a larger job `aflora trace` has all: reading takes seconds for each
# The columns of the HPARAMS tab, the same for every run: TensorBoard takes one run's list for all of them.
_RESULTS = ("metric", "train_seconds", "samples_per_second", "avg_trainable_params", "peak_memory_bytes")


class Telemetry:
    """Scalars, scores by layer, Fig. 5, profiler windows, texts. Who fails to take something is told nothing any more.

    Args:
        board: TensorBoard, which takes all of it.
        trackers: Others, which take scalars and hyperparameters, and texts and figures if they can.
    """

    def __init__(self, board: TensorBoard | None = None, trackers: Sequence[Tracker] = ()) -> None:
        self.board = board
        self.watchers: list[TensorBoard | Tracker] = [*([] if board is None else [board]), *trackers]

    def _tell(self, call: Callable[[Any], Any]) -> None:
        for watcher in [*self.watchers]:
            try:
                call(watcher)
            except watcher.survived as error:
                self.watchers.remove(watcher)
                logger.warning(watcher.complaint(error))

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        found = {tag: value for tag, value in values.items() if value is not None}
        self._tell(lambda watcher: watcher.scalars(found, step))

    def scores(self, scores: Mapping[str, float], step: int) -> None:
        """The freezing score (Eq. 4) of each matrix that still trains: a group of charts per layer."""
        positions = {name: matrix_position(name) for name in scores}
        called = stack_names(where.stack for where in positions.values())
        tags = {}
        for name, score in scores.items():
            where = positions[name]
            tags[f"score {called[where.stack]}layer {where.layer:02d}/{where.kind}"] = score
        if tags:
            self.scalars(tags, step)

    def freeze_map(
        self,
        names: Sequence[str],
        frozen: Mapping[str, int],
        total_steps: int,
        step: int,
        ends: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Fig. 5 as it stands now."""
        if names and self.watchers:
            from ..figures import freeze_map  # matplotlib, only where something is drawn

            self.figure("freezing/Fig. 5", freeze_map(names, frozen, total_steps, ends), step)

    def windows(self, run: Path, step: int) -> None:
        """The profiler's windows of a run side by side, as bars and as tables: what `aflora trace` says."""
        if not self.watchers:
            return
        from ..figures import window_bars

        try:
            windows, notes = read_run(run, _COMPARED_RANKS)
        except AFLoRAError as error:
            logger.warning(f"the profiler's windows are not compared: {error}")
            return
        self.figure("profile/windows", window_bars(windows), step)
        said = "\n".join(f"- {note}" for note in notes)
        self.text("profile/tables", "\n\n".join([*(table.markdown() for table in tables(windows)), said]), step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        figure.set_dpi(120)
        self._tell(lambda watcher: watcher.figure(tag, figure, step))

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._tell(lambda watcher: watcher.text(tag, markdown, step))

    def result(self, config: Config, result: Mapping[str, Any], step: int) -> None:
        """What the run came to, and its row in TensorBoard's HPARAMS tab."""
        known = {**result, "metric": next(iter(result["metrics"].values()), None)}  # without data to evaluate on
        values = {f"result/{name}": known[name] for name in _RESULTS if known[name] is not None}
        self.scalars(values, step)
        board = self.board
        if board is None:
            return
        columns = {
            "task": config.data.task,
            "model": config.model.name,
            "engine": f"{result['world_size']} x {result['engine']}",
            "precision": result["mixed_precision"],
            "epochs": config.train.epochs,
            "batch size": config.train.batch_size,
            "learning rate": config.train.learning_rate,
            "head learning rate": config.train.head_learning_rate,
            "weight decay": config.train.weight_decay,
            "r": config.adapter.r,
            "freezable": config.adapter.freezable,
            "freezing": config.adapter.freezing,
            "score": config.freezing.score,
            "unit": config.freezing.unit,
            "seed": config.train.seed,
        }
        self._tell(lambda watcher: watcher is board and board.row(columns, values))

    def close(self) -> None:
        self._tell(lambda watcher: watcher.close())
        self.watchers.clear()


def open_telemetry(config: Config, run: Path, first_step: int, facts: Mapping[str, str]) -> Telemetry:
    """What run.trackers asks for, in a run's directory.

    Args:
        first_step: Of this process; not 0 where a run is resumed.
        facts: Hyperparameters besides the configuration's.

    Raises:
        AFLoRAError: A tracker does not start.
    """
    board: TensorBoard | None = None
    if TENSORBOARD in config.run.trackers:
        from .tensorboard import TensorBoard

        board = TensorBoard(run / "tensorboard", first_step)
    others = dict.fromkeys(name for name in config.run.trackers if name != TENSORBOARD)
    return Telemetry(board, [Tracker(name, run, {**hyperparameters(config), **facts}) for name in others])


def hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """The configuration as trackers take it: flat, lists and what is not given as text."""
    plain = (bool, int, float, str)
    return {name: v if isinstance(v, plain) else json.dumps(v) for name, v in flat(asdict(config)).items()}


def run_summary(config: str, facts: Mapping[str, Any]) -> str:
    """Markdown: what this run is, and its resolved configuration."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"| | |\n|---|---|\n{rows}\n```yaml\n{yaml.safe_dump(yaml.safe_load(config), sort_keys=False)}```\n"
