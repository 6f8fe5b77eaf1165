"""The windows of a run: all files under tensorboard/profile, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ..errors import AFLoRAError
from .analysis import RankReport, WindowReport, report_rank, waits
from .reader import RankTrace, TraceError, rank_in_name, read_trace

_STANDARD = ("1_before", "2_middle", "3_after")


def read_run(run: Path, only: Sequence[int] | None = None) -> tuple[list[WindowReport], list[str]]:
    """The windows of a run, and what is missing of them. One file is held in memory at a time.

    Args:
        only: The ranks to read; all if None.

    Raises:
        AFLoRAError: There is no trace that can be read.
    """
    profile = run / "tensorboard" / "profile"
    if not run.is_dir():
        raise AFLoRAError(f"There is no folder {run}. Name a run's directory.")
    if not profile.is_dir():
        raise AFLoRAError(f"{run} has no traces (tensorboard/profile): train with --profile to record them.")
    windows, problems = [], []
    world = 0
    for folder in sorted(path for path in profile.iterdir() if path.is_dir()):
        traces: dict[int, RankTrace] = {}
        reports: list[RankReport] = []
        for file in sorted(file for file in folder.iterdir() if not file.name.endswith(".memory.pickle")):
            if only is not None and rank_in_name(file) not in (None, *only):
                continue
            if file.exists() and not file.is_file():  # a pipe would be waited for
                problems.append(f"{file} is not a file.")
                continue
            try:
                trace = read_trace(file)
            except TraceError as error:
                problems.append(str(error))
                continue
            world = max(world, trace.world_size or 0)
            if trace.rank in traces:
                problems.append(f"{file} is another trace of rank {trace.rank} and is left out.")
            elif only is None or trace.rank in only:
                reports.append(report_rank(trace))
                trace.operators, trace.device, trace.launched = [], [], []  # what remains is small
                traces[trace.rank] = trace
        if not reports:
            problems.append(f"{folder.name} has no trace that can be read{'' if only is None else ' of these ranks'}.")
            continue
        waiting = waits(list(traces.values())) if len(traces) > 1 else None
        if waiting is None and len(traces) > 1:
            problems.append(f"{folder.name}: the ranks did not take part in the same collectives; no waits are shown.")
        windows.append(WindowReport(folder.name, tuple(sorted(reports, key=lambda r: r.rank)), waiting))
    if not windows:
        raise AFLoRAError(" ".join([f"{run} has no traces that can be read.", *problems]))
    return windows, problems + _notes(windows, profile, world, only)


def _notes(windows: Sequence[WindowReport], profile: Path, world: int, only: Sequence[int] | None) -> list[str]:
    names = [window.name for window in windows]
    said = [
        f"{name} is missing: the run has not come to it, or it was not written."
        for name in _STANDARD
        if name not in names and set(names) & set(_STANDARD)
    ]
    present = {r.rank for window in windows for r in window.ranks}
    for window in windows:
        if absent := sorted(present - {r.rank for r in window.ranks}):
            said.append(f"{window.name} has no trace of rank {', '.join(map(str, absent))}.")
    if only is None and (absent := list(islice((rank for rank in range(world) if rank not in present), 9))):
        listed = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        said.append(f"Of {world} ranks there are no traces of {listed}.")
    if snapshots := sorted(profile.glob("*/*.memory.pickle")):
        listed = ", ".join(str(path) for path in snapshots)
        said.append(f"CUDA memory around a freeze, to be dropped on https://pytorch.org/memory_viz: {listed}")
    for window in windows:
        aside = max(r.aside_ms for r in window.ranks)
        if aside:
            said.append(f"{window.name}: {aside:,.0f} ms of evaluation and checkpoints lie in it and are left out.")
    return said
