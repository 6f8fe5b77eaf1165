"""What TensorBoard shows of a run. Written by the main process; trouble with it never costs a training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..names import place
from ..training.config import Config

# The columns of the HPARAMS tab, the same for every run: TensorBoard takes one run's list for all of them.
_RESULTS = ("metric", "train_seconds", "samples_per_second", "avg_trainable_params", "peak_memory_bytes")


class Telemetry:
    """Scalars, scores by layer, Fig. 5, the configuration as text, hparams.

    Args:
        folder: Where the events go; None: nothing is written.
        first_step: A resumed run's first step: what an earlier process wrote from there on is hidden.
    """

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        if folder is not None:
            purge = first_step or None
            self._guarded(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=purge)))

    @property
    def on(self) -> bool:
        return self._writer is not None

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Write all values in one event, which costs a tenth of as many calls of add_scalar."""
        found = [Summary.Value(tag=tag, simple_value=v) for tag, v in values.items() if v is not None]
        self._write(lambda writer: _events(writer).add_summary(Summary(value=found), step))

    def scores(self, scores: Mapping[str, float], step: int) -> None:
        """The freezing score (Eq. 4) of each matrix that still trains: a group of charts per layer."""
        places = {name: place(name) for name in scores}
        several = len({where.stack for where in places.values()}) > 1
        tags = {}
        for name, score in scores.items():
            where = places[name]
            stack = f"{where.stack.split('.')[0]} " if several else ""
            tags[f"score {stack}layer {where.layer:02d}/{where.kind}"] = score
        self.scalars(tags, step)

    def freeze_map(self, names: Sequence[str], frozen: Mapping[str, int], total_steps: int, step: int) -> None:
        """Fig. 5 as it stands now."""
        if names and self.on:
            from ..view.figures import freeze_map  # matplotlib, only where something is drawn

            figure = freeze_map(names, frozen, total_steps)
            figure.set_dpi(120)
            self._write(lambda writer: writer.add_figure("freezing/Fig. 5", figure, step))

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        self._write(lambda writer: writer.add_text(tag, markdown, step))

    def result(self, config: Config, result: Mapping[str, Any], step: int) -> None:
        """The run's row in the HPARAMS tab."""
        metric = next(iter(result["metrics"].values()))
        values = {f"result/{name}": metric if name == "metric" else result[name] for name in _RESULTS}
        self.scalars(values, step)
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
            "pairwise": str(config.freezing.pairwise),
            "seed": config.train.seed,
        }

        def write(writer: SummaryWriter) -> None:
            for summary in hparams(columns, dict.fromkeys(values, 0.0)):
                _events(writer).add_summary(summary)

        self._write(write)

    def close(self) -> None:
        self._write(lambda writer: writer.close())
        self._writer = None

    def _write(self, call: Callable[[SummaryWriter], Any]) -> None:
        if (writer := self._writer) is not None:
            self._guarded(lambda: call(writer))

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:  # of this call or of an earlier one: events are written by a thread
            self._writer = None
            print(
                f"aflora: warning: TensorBoard's events could not be written to {self.folder} "
                f"({error.strerror or error}); training goes on without them.",
                file=sys.stderr,
                flush=True,
            )


def _events(writer: SummaryWriter) -> Any:
    return writer.file_writer


def run_summary(config: str, facts: Mapping[str, Any]) -> str:
    """Markdown: what this run is, and its resolved configuration."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"| | |\n|---|---|\n{rows}\n```yaml\n{yaml.safe_dump(yaml.safe_load(config), sort_keys=False)}```\n"
