"""TensorBoard's events of a run. Written by the main process; trouble with them never costs a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..notices import logger


class TensorBoard:
    """Writes scalars, texts, figures and the row of the HPARAMS tab.

    Args:
        folder: Where the events go.
        first_step: A resumed run's first step: what an earlier process wrote from there on is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        purge = first_step or None
        self._guarded(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=purge)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write all values in one event, which costs a tenth of as many calls of add_scalar."""
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(lambda writer: _events(writer).add_summary(Summary(value=found), step))

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._write(lambda writer: writer.add_text(tag, markdown, step))

    def figure(self, tag: str, figure: Any, step: int) -> None:
        self._write(lambda writer: writer.add_figure(tag, figure, step))

    def row(self, columns: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """The run's row in the HPARAMS tab: its settings beside scalars that it has."""

        def write(writer: SummaryWriter) -> None:
            for summary in hparams(columns, dict.fromkeys(scalars, 0.0)):
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
            logger.warning(
                f"TensorBoard's events could not be written to {self.folder} ({error.strerror or error}); training "
                f"goes on without them."
            )


def _events(writer: SummaryWriter) -> Any:
    return writer.file_writer
