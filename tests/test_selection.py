"""`make test` leaves no file of tests out and no engine, and what it is told to leave out is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.selection import COLLECTED, STAYS, is_left_out

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"tests/training/test_quantized.py": "without bitsandbytes nothing of it is collected"}
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# Feature -> how the ids of its tests begin. Each engine has to meet each.
FEATURES = {
    "freezing like one process": "tests/engines/test_equivalence.py::",
    "dealing": "tests/engines/test_dealing.py::",
    "a freeze, looked at": "tests/engines/test_drop.py::",
    "resuming": "tests/store/test_resume.py::test_any_engine_goes_on_from_any_other",
    "Trainer": "tests/test_trainer.py::",
    "a mean over tokens": "tests/training/test_sft.py::test_the_loss_is_the_mean",
}


def engines(ids: list[str]) -> set[str]:
    """Those that stand in the parameters of tests."""
    return {engine for name in ids for engine in ENGINES if re.search(rf"\[(.*-)?{engine}(-|\])", name)}


@pytest.fixture
def everything() -> list[str]:
    """The ids of all tests, where all have been collected: by `make test`, not by a file of its own."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    if files - {test.split("::")[0] for test in COLLECTED} - {*ELSEWHERE}:
        pytest.skip("only where all tests are collected")
    return COLLECTED


def test_every_file_and_every_engine_is_in_make_test(everything: list[str]) -> None:
    quick = [test for test in everything if not is_left_out(test)]
    files = {test.split("::")[0] for test in everything}
    assert files - {test.split("::")[0] for test in quick} == set()
    for feature, tests in FEATURES.items():
        assert engines([test for test in quick if test.startswith(tests)]) >= {*ENGINES} - {"single"}, feature
    assert engines(quick) == {*ENGINES}


def test_what_is_left_out_or_stays_is_there(everything: list[str]) -> None:
    known = {*everything}
    for test, parameters in STAYS.items():
        there = [name for name in known if name.split("[")[0] == test]
        assert there, f"{test} is left out by tests/selection.py, and is not there"
        assert {f"{test}[{stays}]" for stays in parameters} <= {*there}, test
        assert any(is_left_out(name) for name in there), f"nothing of {test} is left out"


def test_what_is_left_out_is_named_with_its_parameters() -> None:
    test, (stays, *_) = next((test, stays) for test, stays in STAYS.items() if stays)
    assert not is_left_out(f"{test}[{stays}]")
    assert is_left_out(f"{test}[something else]")
    assert not is_left_out("tests/test_selection.py::test_what_is_left_out_is_named_with_its_parameters")
