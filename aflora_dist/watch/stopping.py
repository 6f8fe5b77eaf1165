"""Leaving early and together: a stop request, or a failure, of any rank, agreed on by all at an update."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState

from ..errors import AFLoRAError
from ..processes.cpu_group import cpu_group
from ..processes.meeting import meet

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_SECONDS = 1.0  # between two exchanges, about


class StopRequest:
    """Whether all ranks should save and leave after this update.

    The request comes as SIGUSR1 or SIGTERM to any rank, as Ctrl-C to a single one, or as a file, for launchers do not
    pass signals on. About once a second the ranks exchange three numbers (over gloo if they can, which leaves a GPU's
    queue alone): whether one of them has been asked, whether one has failed, and after how many updates they exchange
    again. A rank that is gone cannot take part, so that the SIGTERM that a launcher sends to those it left behind saves
    nothing and ends them.

    Args:
        file: Its existence is a request, too; the main process looks for it.
    """

    def __init__(self, file: Path | None, is_main: bool) -> None:
        self.file = file if is_main else None
        self._requested = False
        self._group = cpu_group()
        self._device = torch.device("cpu") if self._group is not None else PartialState().device
        self._updates = self._every = 1
        self._began = time.monotonic()
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            # A launcher that is interrupted ends its ranks by itself, and at once.
            usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored, or somebody's own
            alone = (signal.SIGINT,) if usual and not dist.is_initialized() else ()
            self._previous = {number: signal.signal(number, self._note) for number in (*_SIGNALS, *alone)}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Give the signals back; of several ranks, one that fails keeps them until it has said why.

        The launcher's SIGTERM to those that are left comes at the moment at which they find out that another is gone.
        """
        if kind is None or not dist.is_initialized():
            self.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if number == signal.SIGINT:
            with suppress(OSError):  # what standard error was led to may have had the same Ctrl-C
                os.write(2, b"\naflora: saving after this update; Ctrl-C once more leaves at once.\n")  # not in a print
            signal.signal(number, self._previous[number])

    def agreed(self, failure: str | None = None) -> bool:
        """Call it after each update: True after the same one on every rank. A collective.

        Args:
            failure: Why this rank cannot go on.

        Raises:
            AFLoRAError: On every rank, with the reason, if one of them cannot go on.
        """
        self._updates -= 1
        if self._updates:
            return False
        took, self._began = time.monotonic() - self._began, time.monotonic()
        requested = self._requested or (self.file is not None and self.file.exists())
        a_second = int(self._every * _SECONDS / max(took, 1e-3))
        following = max(1, min(a_second, 2 * self._every))
        # The maximum: any request, any failure, the fewest updates.
        mine = float(requested), float(failure is not None), -float(following)
        any_request, any_failure, fewest = self._maximum(*mine)
        self._updates = self._every = int(-fewest)
        self._raise(failure, any_failure)
        if any_request and self.file is not None:
            self.file.unlink(missing_ok=True)  # it was about this process, not about the next
        return bool(any_request)

    def settle(self, failure: str | None) -> None:
        """Raise on every rank, with the reason, if one of them cannot go on, now and not at the next exchange."""
        (any_failure,) = self._maximum(float(failure is not None))
        self._raise(failure, any_failure)

    def _maximum(self, *numbers: float) -> list[float]:
        vector = torch.tensor(numbers, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._group)
        return vector.tolist()

    @staticmethod
    def _raise(failure: str | None, anywhere: float) -> None:
        if anywhere:
            raise AFLoRAError(next(reason for reason in meet(failure) if reason is not None))

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
