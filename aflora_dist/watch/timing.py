"""How long a training has trained: on the clock, and of this process's threads, which other work does not change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TrainingTime:
    """Seconds of training so far; evaluation is not in them."""

    def __init__(self) -> None:
        self._before = (0.0, 0.0)
        self._since: tuple[float, float] | None = None

    @property
    def seconds(self) -> tuple[float, float]:
        """On the clock, and of the processor."""
        if self._since is None:
            return self._before
        wall, processor = _now()
        return self._before[0] + wall - self._since[0], self._before[1] + processor - self._since[1]

    @seconds.setter
    def seconds(self, so_far: tuple[float, float]) -> None:
        self._before = so_far

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What happens inside counts."""
        self._since = _now()
        try:
            yield
        finally:
            self._before, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not, in the midst of it."""
        self._before, self._since = self.seconds, None
        yield
        self._since = _now()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
