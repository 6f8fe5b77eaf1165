"""`make test` leaves no file of tests out and no engine, and what it is told to leave out is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.selection import COLLECTED, STAYS, is_left_out, stays

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"tests/training/test_quantized.py": "without bitsandbytes nothing of it is collected"}
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
# Feature -> how the ids of its tests begin. Each engine has to meet each.
FEATURES = {
    "freezing like one process": "tests/engines/test_equivalence.py::",
    "batches dealt by length": "tests/engines/test_dealing.py::",
    "a drop, looked at": "tests/engines/test_drop.py::",
    "resuming": "tests/store/test_resume.py::test_any_engine_goes_on_from_any_other",
    "Trainer": "tests/test_trainer.py::",
    "a mean over tokens": "tests/training/test_sft.py::test_the_loss_is_the_mean",
}


def engines(ids: list[str]) -> set[str]:
    """Those that stand in the parameters of tests."""
    return {engine for name in ids for engine in ENGINES if re.search(rf"\[(.*-)?{engine}(-|\])", name)}


@pytest.fixture
def everything() -> list[str]:
    """The ids of all tests, where all have been collected: by `make test`, not where one file is asked for."""
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
    found: dict[str, list[str]] = {}
    for test in everything:
        name, _, parameters = test.partition("[")
        found.setdefault(name.removeprefix("tests/"), []).append(parameters.removesuffix("]"))
    named = {f"{file}::{name}": kept for file, tests in STAYS.items() for name, kept in tests.items()}
    assert sorted({*named} - {*found}) == [], "tests/selection.py names what is not there"
    for name, kept in named.items():
        assert [one for one in kept if not any(stays(parameters, (one,)) for parameters in found[name])] == [], name
        assert not all(stays(parameters, kept) for parameters in found[name]), f"nothing of {name} is left out"


def test_what_stays_is_told_by_its_parameters() -> None:
    assert stays("ddp-2", ("single-1", "ddp-2"))
    assert stays("zero1-names0", ("zero1-*",))
    assert stays("True-{}-bert", ("*-bert",))
    assert not stays("zero2-names1", ("zero1-*", "zero2"))
    assert not stays("", ())
    assert is_left_out("tests/engines/test_dealing.py::test_dealt_batches_train_what_undealt_ones_train[ddp-3]")
    assert not is_left_out("tests/engines/test_dealing.py::test_dealt_batches_train_what_undealt_ones_train[ddp-2]")
    assert not is_left_out("tests/test_selection.py::test_what_stays_is_told_by_its_parameters")
