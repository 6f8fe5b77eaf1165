"""Fixtures and the no-skip rule of continuous integration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def glue() -> Path:
    """A folder of real GLUE TSV files, where one lies beside the checkout."""
    folder = SHARED / "glue"
    if not folder.is_dir():
        pytest.skip("no folder of GLUE's TSV files beside the checkout")
    return folder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With AFLORA_EXCUSED_SKIPS, a test fails that is skipped for a reason without one of these words (by commas)."""
    outcome = yield
    report = outcome.get_result()
    excused = os.environ.get("AFLORA_EXCUSED_SKIPS")
    if report.skipped and excused and not any(word in str(report.longrepr) for word in excused.split(",")):
        report.outcome = "failed"
        report.longrepr = f"skipped although skipping is not allowed here: {report.longrepr}"
