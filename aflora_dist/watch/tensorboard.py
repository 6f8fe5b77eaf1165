"""TensorBoard's events of a run: scalars, texts, figures and the row of the HPARAMS tab. On the main process only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


class TensorBoard:
    """Its methods raise OSError where events cannot be written, these or, for a thread writes them, earlier ones.

    Args:
        folder: Where the events go.
        first_step: A resumed run's first step: what an earlier process wrote from there on is hidden.
    """

    survived = OSError  # what ends the events, and not the training

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._writer: Any = None

    def complaint(self, error: Exception) -> str:
        return (
            f"TensorBoard's events could not be written to {self._folder} ({getattr(error, 'strerror', None) or error})"
            f"; training goes on without them."
        )

    @property
    def writer(self) -> Any:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._first_step or None)
        return self._writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write all values in one event, which costs a tenth of as many calls of add_scalar."""
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=found), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self.writer.add_text(tag, markdown, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        self.writer.add_figure(tag, figure, step)

    def row(self, columns: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """The run's row in the HPARAMS tab: its settings beside scalars that it has."""
        for summary in hparams(columns, dict.fromkeys(scalars, 0.0)):
            self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        self.writer.close()
