"""What tests cost, in seconds of CPU rather than by the clock: on a shared machine only those say anything.

    python -m pytest -p tests.cpu_seconds tests/store

Prints the dearest files and tests. What a test's fixtures need for the first time counts as that test's, what they
need to end as the last one's; so do all processes that it starts, those still alive (what ranks are forked from)
included. A process that was handed to init is not seen.
"""

from __future__ import annotations

import contextlib
import resource
from collections import defaultdict
from collections.abc import Generator

import psutil
import pytest

SHOWN = 40  # tests
PROPERTY = "cpu_seconds"


def cpu_seconds() -> float:
    """Of this process, and of all that it has started and they have: the living and the dead."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(child.cpu_times()[:4])  # user, system, and theirs of children that have ended
    return total


class Meter:
    """Reads the clock at the end of every phase of every test."""

    def __init__(self) -> None:
        self.last = 0.0  # what is spent before the first test, imports and collecting, counts as its
        self.spent: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = cpu_seconds()
        report.user_properties = [*report.user_properties, (PROPERTY, now - self.last)]
        self.last = now
        return report

    def pytest_collection_finish(self) -> None:
        now = cpu_seconds()
        self.spent["(imports, collecting)"] += now - self.last
        self.last = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == PROPERTY:
                self.spent[report.nodeid] += value  # type: ignore[operator]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self.spent.items():
            files[test.partition("::")[0]] += seconds
        for title, costs, shown in (("tests", self.spent, SHOWN), ("files", files, len(files))):
            terminalreporter.section(f"CPU seconds of {title}")
            for name in sorted(costs, key=lambda name: -costs[name])[:shown]:
                terminalreporter.write_line(f"{costs[name]:8.1f}  {name}")
        terminalreporter.write_line(f"{sum(files.values()):8.1f}  together")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Meter(), "cpu-seconds-meter")
