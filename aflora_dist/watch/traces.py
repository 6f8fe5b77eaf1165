"""Profiler traces that TensorBoard's profiler plugin reads right and that Perfetto opens unchanged.

The plugin (torch-tb-profiler 0.4.3) stopped following torch in 2023. Of what torch writes today it drops the
ranges that people name, knows no `cuda_runtime`, and takes a step's shadow on the GPU for another step. What is
written here differs from torch's own file in the categories of those events and in nothing else.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import record_function

from ..compat.patch import patch
from ..errors import AFLoRAError
from ..freezing import Moments
from ..notices import logger
from ..processes import on_main
from ..processes.meeting import meet
from .memory import MemoryHistory

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports its every start and stop

# What torch 2.13 writes -> what the plugin has to find in its place.
_CATEGORIES = {
    # record_function's ranges and the data loader: dropped as annotations, listed as operators.
    "user_annotation": "cpu_op",
    # The link from an operator to the kernels it launched; without it device times are missing.
    "cuda_runtime": "Runtime",
    "cuda_driver": "Runtime",
    # The same ranges drawn on a stream: counted as further steps. The plugin skips what it does not know.
    "gpu_user_annotation": "gpu_range",
}


def for_plugin(trace: dict[str, Any]) -> dict[str, Any]:
    """A Chrome trace as torch writes it, with the categories that the plugin knows.

    The events come last, for the plugin adds its GPU counters before the file's last bracket.
    """
    events = [
        {**event, "cat": _CATEGORIES[event["cat"]]} if event.get("cat") in _CATEGORIES else event
        for event in trace["traceEvents"]
    ]
    return {**{key: value for key, value in trace.items() if key != "traceEvents"}, "traceEvents": events}


def write_trace(profiler: torch.profiler.profile, folder: Path, rank: int) -> Path:
    """Write what a profiler has recorded; the plugin shows `folder` as a run and its files as workers.

    The plugin reads a folder once, when it first sees a trace in it: fill it outside of TensorBoard's
    folder and move it there when all ranks have written.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(raw))
        try:
            trace = json.loads(raw.read_bytes())
        except ValueError:  # torch does not notice that it could not write everything
            raise OSError("torch wrote an incomplete file; is the disk full?") from None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{socket.gethostname()}_{rank}.1.pt.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps(for_plugin(trace), separators=(",", ":")).encode(), 6))
    return path


@dataclass(frozen=True)
class Window:
    """Updates `start` to `start + steps - 1`, recorded under a name; whether matrices freeze in one of them."""

    name: str
    start: int
    steps: int
    freezes: bool = False


def windows(moments: Moments, steps: int, starts: Sequence[int] | None = None) -> tuple[Window, ...]:
    """Which updates to record.

    Args:
        moments: When something may freeze.
        steps: Length of each window.
        starts: First updates of the windows. By default one window before the first freeze, one around the
            freeze that leaves half of the matrices, one after the last; where there are too few updates for one, it
            is as short as it must be, or left out.

    Raises:
        AFLoRAError: A window does not fit into the training, or two that were chosen overlap.
    """
    total, freezes = moments.total, moments.freezes
    if starts is None:
        if moments.middle is None:
            chosen = {"training": (1, steps)}
        else:
            first, last = freezes[0], freezes[-1]
            after = max(last + 1, min(last + 1 + (total - last) // 2, total - steps))
            chosen = {
                "1_before": (max(1, min(5, first - steps - 1)), min(steps, first - 1)),
                "2_middle": (moments.middle - steps // 2, steps),
                "3_after": (after, min(steps, total - after)),
            }
        if steps < total:
            chosen = _beside_each_other(chosen, total)
    else:
        chosen = {f"{i}_from_{start}": (start, steps) for i, start in enumerate(sorted(starts), 1)}
    found = tuple(
        Window(name, start, length, bisect_left(freezes, start + length) > bisect_left(freezes, start))
        for name, (start, length) in chosen.items()
        if length > 0
    )
    free = 1  # the step before a window warms the profiler up
    for window in found:
        if window.start < free or window.start + window.steps > total:
            raise AFLoRAError(
                f"Profiling does not fit: {', '.join(f'{w.steps} steps from step {w.start}' for w in found)} of "
                f"{total}. The step before each window is needed to warm up. Lower profile.steps, or choose "
                f"profile.starts."
            )
        free = window.start + window.steps + 1
    return found


def _beside_each_other(chosen: dict[str, tuple[int, int]], total: int) -> dict[str, tuple[int, int]]:
    """These windows (start, length) without what lies in an earlier one, or in the step before that warms up."""
    found, free = {}, 1
    for name, (start, length) in chosen.items():
        begin, end = max(start, free), min(start + length, total)
        found[name] = (begin, end - begin)
        if end > begin:
            free = end + 1
    return found


class TraceRecorder:
    """Records the windows of a training, on the ranks asked for. Between them it costs nothing.

    Call `advance` after each update, on every rank. A trace that cannot be written is reported and
    ends the recording, not the training.

    Args:
        first_step: The first update of this process; windows that began before it are left out.
        folder: TensorBoard's folder of the run; each window goes to `profile/<name>` in it.
        ranks: Which ranks record; all if None.
        memory: Record allocations as well.
        history: What writes a snapshot of CUDA memory beside the trace of each window with a freeze; none if None.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        first_step: int,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        ranks: Sequence[int] | None,
        memory: bool,
        history: MemoryHistory | None = None,
    ) -> None:
        self.windows = [window for window in windows if window.start > first_step]
        self.folder, self.accelerator = folder, accelerator
        self._model, self._optimizer, self._memory = model, optimizer, memory
        self._records = ranks is None or accelerator.process_index in ranks
        self._history = history
        self._profiler: torch.profiler.profile | None = None
        self._ranges = ExitStack()  # what ends with a window
        self._failure: str | None = None
        self._before(first_step)

    def advance(self, step: int) -> None:
        """Update `step` is done. A collective at the end of a window."""
        if not self.windows:
            return
        window = self.windows[0]
        if self._profiler is not None:
            self._profiler.step()  # after the last step of a window this writes the trace
        if step == window.start + window.steps - 1:
            self._write_memory(window)
            self._stop()
            self.windows.pop(0)
            self._show(window)
        self._before(step + 1)

    def close(self) -> None:
        """Leave everything as it was; a window that has not ended is dropped."""
        if self._profiler is not None:
            self._profiler.on_trace_ready = None  # torch hands over what a stopped profiler has, too
        self.windows.clear()
        self._stop()

    @property
    def written(self) -> list[Path]:
        """The folders of all windows recorded so far, by earlier processes too."""
        return sorted((self.folder / "profile").glob("*"))

    def _before(self, step: int) -> None:
        if not self.windows or not self._records or step != self.windows[0].start - 1:
            return
        window = self.windows[0]
        self._ranges.enter_context(named_ranges(self.accelerator, self._model, self._optimizer))
        if self._history is not None and window.freezes:
            self._history.start()
            self._ranges.callback(self._history.stop)
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=window.steps, repeat=1),
            on_trace_ready=lambda profiler: self._write(profiler, window),
            record_shapes=True,
            profile_memory=self._memory,
        )
        self._profiler.start()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        self._ranges.close()

    def _staged(self, window: Window) -> Path:
        return self.folder.parent / f".trace_{window.name}"  # beside TensorBoard's folder: see write_trace

    def _write(self, profiler: torch.profiler.profile, window: Window) -> None:
        try:
            write_trace(profiler, self._staged(window), self.accelerator.process_index)
        except OSError as error:
            self._failure = error.strerror or str(error)

    def _write_memory(self, window: Window) -> None:
        if self._history is None or not self._records or not window.freezes:
            return
        name = f"{socket.gethostname()}_{self.accelerator.process_index}.memory.pickle"
        try:
            self._history.write(self._staged(window) / name)
        except OSError as error:
            self._failure = error.strerror or str(error)

    def _show(self, window: Window) -> None:
        """Move what all ranks have written to where TensorBoard looks. A collective."""
        failures = [failure for failure in meet(self._failure) if failure is not None]
        target = self.folder / "profile" / window.name

        def move() -> str | None:
            if failures:
                return failures[0]
            try:
                shutil.rmtree(target, ignore_errors=True)  # of a process that was killed before its next checkpoint
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._staged(window), target)
            except OSError as error:
                return error.strerror or str(error)
            return None

        failure = on_main(self.accelerator, move)
        if failure is None:
            return
        self.windows.clear()
        if self.accelerator.is_main_process:
            shutil.rmtree(self._staged(window), ignore_errors=True)
            logger.warning(
                f"the profiler's trace {window.name} could not be written to {self.folder} ({failure}); training goes "
                f"on, without traces."
            )


@contextmanager
def named_ranges(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> Iterator[None]:
    """While entered, calls of the model, of backward and of the optimizer carry these names in a trace."""
    wrapper = getattr(accelerator, "deepspeed_engine_wrapped", None)
    calls = [(model, "forward", "forward")]
    if wrapper is not None:  # accelerator.backward would take the step in, too
        calls += [(wrapper.engine, "backward", "backward"), (wrapper.engine, "step", "optimizer")]
    else:
        calls += [(accelerator, "backward", "backward"), (optimizer, "step", "optimizer")]
    with ExitStack() as stack:
        for owner, attribute, name in calls:
            if owner is not None:
                stack.callback(patch(owner, attribute, _ranged(getattr(owner, attribute), name)))
        yield


def _ranged(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged
