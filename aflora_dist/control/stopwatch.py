"""Seconds that freezing itself takes. A GPU works behind the host: what others have queued there is not counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds of work, wherever it is done.

    Attributes:
        seconds: So far; what a GPU has not done yet is not in it.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._queued: deque[tuple[torch.Event, torch.Event]] = deque()

    @property
    def seconds(self) -> float:
        self._read()
        return self._total

    @seconds.setter
    def seconds(self, total: float) -> None:
        self._queued.clear()
        self._total = total

    @contextmanager
    def queueing(self, device: torch.device) -> Iterator[None]:
        """What happens inside counts: on a GPU the time between two events of its stream, which nobody waits for."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._total += time.perf_counter() - start
            return
        first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._queued.append((first, last))
        self._read()

    def start(self, device: torch.device) -> float:
        """Begin to count once all that is queued on a device is done; returns what `stop` takes."""
        _synchronize(device)
        return time.perf_counter()

    def stop(self, start: float, device: torch.device) -> float:
        """Count until all that has been queued since is done; returns the seconds since `start`."""
        _synchronize(device)
        seconds = time.perf_counter() - start
        self._total += seconds
        return seconds

    def _read(self) -> None:
        while self._queued and self._queued[0][1].query():
            first, last = self._queued.popleft()
            self._total += first.elapsed_time(last) / 1e3  # from milliseconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
