"""Doing a study's runs: whoever is free claims the next. No scheduler: all state is in folders, which may be shared."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import IO, Any

import psutil
from tqdm import tqdm

from ..errors import AFLoRAError, writing
from ..store.lock import LOCK, try_lock
from ..store.records import METRICS, RESULT
from .grid import Agenda, Grid, Planned
from .results import Results, name_of, result_in

_CLAIM = ".claim"  # in a run's directory: held by who starts the run, from before it begins until it has ended
_SAID = "printed.txt"
_DIVERGED, _ERROR = re.compile(r"aflora: diverged: (.*)"), re.compile(r"aflora: error: (.*)")
_MEMORY = 2 << 30  # bytes of a run of which none is known
_PAUSE = 0.2  # seconds between two looks
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs [{elapsed}{postfix}]"  # its rate counts old runs


def start_process(command: list[str], environment: dict[str, str], said: Path) -> subprocess.Popen[bytes]:
    """Start a run, which prints to the end of a file. Ctrl-C is not for it: who started it has it save and leave."""
    with said.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


@dataclass
class Job:
    """A run that this process has started."""

    run: Planned
    folder: Path
    process: subprocess.Popen[bytes]
    claim: IO[str]
    begun_anew: bool
    printed: int  # bytes of what earlier attempts have said
    began: float = field(default_factory=time.monotonic)


class Work:
    """Does runs of a study until none is left, here or elsewhere.

    Args:
        folder: Where runs' directories go.
        launcher: Options of `accelerate launch`; a plain process if there are none.
        at_once: How many runs at a time; fewer where memory is short.
    """

    def __init__(
        self, grid: Grid, results: Results, folder: Path, launcher: Sequence[str] | None = None, at_once: int = 1
    ) -> None:
        self.grid, self.results, self.folder = grid, results, folder
        self.launcher, self.at_once = launcher, at_once
        self.jobs: dict[str, Job] = {}
        self.leaving = False
        self.broken = ""

    def run(self) -> bool:
        """Do what is left; returns whether all is done.

        Raises:
            AFLoRAError: A run failed; those that had begun beside it have ended.
        """
        handlers = {
            number: signal.signal(number, self._leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            with tqdm(desc=self.grid.study.name, bar_format=_BAR, dynamic_ncols=True, mininterval=1.0) as bar:
                try:
                    return self._until_done(bar)
                finally:
                    self._have_them_leave()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _until_done(self, bar: Any) -> bool:
        while True:
            self.results.read()
            plan = self.grid.plan(self.results.records)
            left = [run for run in plan.runs() if run.name not in self.results.records]
            self._show(bar, plan, left)
            if not left and not plan.open:
                return True
            while not (self.leaving or self.broken) and len(self.jobs) < self._room():
                if not any(self._begin(run) for run in left if run.name not in self.jobs):
                    break
            if not self.jobs and (self.leaving or self.broken):
                if self.broken:
                    raise AFLoRAError(self.broken)
                return False
            ended = 0
            while not ended:
                time.sleep(_PAUSE if self.jobs else 10 * _PAUSE)
                ended = sum(self._look_at(job, bar) for job in [*self.jobs.values()])
                if not self.jobs:
                    break  # others are at work on all that is left: what have they done?

    def _have_them_leave(self) -> None:
        """Nobody looks after what is still going on, as an error ended the study: it is to save and end."""
        for job in self.jobs.values():
            with suppress(OSError):
                (job.folder / "stop").touch()
        for job in self.jobs.values():
            while job.process.poll() is None:
                time.sleep(_PAUSE)
            job.claim.close()
        self.jobs.clear()

    def _room(self) -> int:
        """How many runs there is memory for, with what those that have begun are still to take."""
        known = [
            record["peak_memory_bytes"] * record.get("world_size", 1)
            for record in self.results.records.values()
            if "peak_memory_bytes" in record and record.get("train_cpu_seconds")  # of others it is a GPU's
        ]
        need = max(known, default=_MEMORY)
        promised = sum(max(0, need - _memory_of(job.process)) for job in self.jobs.values())
        free = max(0, psutil.virtual_memory().available - promised) // need
        return max(1, min(self.at_once, len(self.jobs) + int(free)))

    def _begin(self, run: Planned) -> bool:
        """Start a run, unless somebody else is at it or has done it."""
        folder = self.folder / run.name
        with writing("A run", folder, "Name another folder with --out."), ExitStack() as held:
            folder.mkdir(parents=True, exist_ok=True)
            claim = held.enter_context((folder / _CLAIM).open("a+", encoding="utf-8"))
            if not try_lock(claim) or _is_held(folder / LOCK):
                return False
            self.results.read()
            if run.name in self.results.records:
                return False
            if (found := result_in(folder)) is not None:
                self._keep(run, folder, found, None)
                return True
            self.results.refuse_unwritable()
            (folder / "stop").unlink(missing_ok=True)
            anew, said = not (folder / "config.yaml").exists(), folder / _SAID
            printed = said.stat().st_size if said.exists() else 0
            process = start_process(self._command(run, folder), self._environment(), said)
            held.pop_all()
        self.jobs[run.name] = Job(run, folder, process, claim, anew, printed)
        return True

    def _command(self, run: Planned, folder: Path) -> list[str]:
        start = [sys.executable]
        if self.launcher is not None:
            start += ["-m", "accelerate.commands.launch", *self.launcher]
        return [*start, "-m", "aflora_dist.training.run", *run.line(), "--run.dir", str(folder), "--resume"]

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.at_once)
        ours = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        return {**ours, **os.environ, "AFLORA_STOP_CLEARED": "1"}

    def _look_at(self, job: Job, bar: Any) -> bool:
        """Whether a job has ended; keeps its result."""
        if self.leaving:
            with suppress(OSError):
                (job.folder / "stop").touch()
        status = job.process.poll()
        if status is None:
            return False
        del self.jobs[job.run.name]
        with job.claim:
            found = result_in(job.folder)
            seconds = time.monotonic() - job.began if job.begun_anew else None
            said = (job.folder / _SAID).read_bytes()[job.printed :].decode("utf-8", errors="replace")
            if found is None:
                found = _broke_down(job, status, said)
            if found is not None and job.run.name != name_of(job.run.config):
                aside = _put_aside(job.folder)
                self.broken = (
                    f"{job.run.method} on {job.run.task}, seed {job.run.seed}: its data were changed while it ran, so "
                    f"it is not kept; what it left is in {aside}. The same command runs it again."
                )
            elif found is not None:
                self._keep(job.run, job.folder, found, seconds)
                bar.write(f"{job.run.task}, {job.run.method}, seed {job.run.seed}: {self._came_to(job.run)}")
            elif not status:  # somebody has asked it to stop
                self.leaving = True
            elif not self.leaving and not _is_held(job.folder / LOCK):
                self.broken = (
                    f"{job.run.method} on {job.run.task}, seed {job.run.seed}, ended with status {status}: "
                    f"{_complaint(said)} All that it printed is in {job.folder / _SAID}."
                )
        return True

    def _keep(self, run: Planned, folder: Path, found: dict[str, Any], seconds: float | None) -> None:
        file = folder / RESULT
        ended = datetime.fromtimestamp(file.stat().st_mtime, UTC) if file.exists() else None
        self.results.keep(run.name, run.config, found, seconds, ended)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a run that has ended nobody goes on

    def _came_to(self, run: Planned) -> str:
        record = self.results.records[run.name]
        if "failed" in record:
            return f"diverged ({record['failed']})"
        return ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items() if value is not None)

    def _show(self, bar: Any, plan: Agenda, left: Sequence[Planned]) -> None:
        done = len(plan.runs()) - len(left)
        bar.total = done + len(left) + plan.open
        bar.n = done
        seconds = estimate(plan, left, self.results)
        if seconds is not None:
            bar.set_postfix_str(f"about {_in_words(seconds / self.at_once)} to go", refresh=False)
        bar.refresh()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        self.leaving = True


def _broke_down(job: Job, status: int, said: str) -> dict[str, Any] | None:
    """Of a run that has left no result: why it counts as one that broke down; None: it does not.

    A value beyond those that a study lists is nobody's wish: where a run of it cannot begin, that is no value.
    """
    if told := _DIVERGED.findall(said):
        return {"failed": shorten(told[-1], 300)}
    begun = (job.folder / METRICS).exists()
    return {"failed": _complaint(said)} if status and job.run.beyond and not begun and _ERROR.search(said) else None


def _complaint(said: str) -> str:
    """Why a run failed; a launcher says more behind it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return shorten(([*_ERROR.findall(said)] or lines or ["It said nothing."])[-1], 300)


def _put_aside(folder: Path) -> Path:
    """Give a run's directory a name under which no study looks for it."""
    names = (folder.with_name(f"{folder.name}.other-data{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    return folder.rename(aside)


def estimate(plan: Agenda, left: Sequence[Planned], results: Results) -> float | None:
    """Seconds for what is left, one after the other: each as its method's done runs, or as all; None: none is known."""
    took: dict[str, list[float]] = {}
    for run in plan.runs():
        if seconds := results.records.get(run.name, {}).get("seconds"):
            took.setdefault(run.method, []).append(seconds)
    if not took:
        return None
    overall = statistics.fmean(seconds for of_method in took.values() for seconds in of_method)
    known = [statistics.fmean(took[run.method]) if run.method in took else overall for run in left]
    return sum(known) + plan.open * overall


def outlook(plan: Agenda, results: Results) -> str:
    """What a study still has to do, in a few words."""
    left = [run for run in plan.runs() if run.name not in results.records]
    total, more = len(plan.runs()) + plan.open, ""
    if plan.open:
        more = f"; what {plan.open} of them train with is decided by the others' results"
    seconds = estimate(plan, left, results)
    takes = f"about {_in_words(seconds)} one after the other" if seconds else "how long is known from the first ones on"
    if not left and not plan.open:
        return f"all {total} runs are done."
    return f"{len(left) + plan.open} of {total} runs to do, {takes}{more}."


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _memory_of(process: subprocess.Popen[bytes]) -> int:
    """Bytes that a run and what it has started hold; 0 where it has ended."""
    held = 0
    with suppress(psutil.Error):
        started = psutil.Process(process.pid)
        for one in (started, *started.children(recursive=True)):
            held += one.memory_info().rss
    return held


def _is_held(file: Path) -> bool:
    """Whether another process has this lock."""
    if not file.exists():
        return False
    with file.open("a+", encoding="utf-8") as opened:
        return not try_lock(opened)
