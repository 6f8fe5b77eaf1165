"""A run's files, cut anywhere or with any byte changed, never end `aflora show` or `aflora collect` in a traceback."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runs import command
from tests.view.written import write_run

collect, show = command("collect"), command("show")

FILES = ("config.yaml", "metrics.jsonl", "freeze_log.jsonl", "result.json")
# What JSON and YAML mean something by, and what is none of their letters.
BYTES = list(b'{}[]":,.-&*!|>?%@`#\n\r\t 0e9nN\\\x00\x1b\x7f\x85\xc3\xff')
# What changes kind: a number that becomes a text, a list, nothing, or too large.
WORDS = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"x"',
    b"9" * 5000,
    b"0",
    b"-1",
    b"1e300",
    b"",
]
fuzz = settings(
    derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole run, and the one that is spoilt."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("whole", "spoilt"):
        write_run(folder / "runs" / name, seed=len(name))
    yield folder
    shutil.rmtree(folder)


def look(folder: Path, name: str, content: bytes) -> None:
    """Both commands, with this in one file of the second run."""
    file = folder / "runs" / "spoilt" / name
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            assert collect([str(folder / "runs"), "--json", str(folder / "table.json")]) == 0
            assert show([str(folder / "runs" / "spoilt")]) in ((0, 2) if name == "config.yaml" else (0,))
        assert all(line.startswith("aflora: ") for line in said.getvalue().splitlines())
    finally:
        file.write_bytes(before)


@fuzz
@given(name=st.sampled_from(FILES), share=st.floats(0, 1))
def test_cut_anywhere(runs: Path, name: str, share: float) -> None:
    content = (runs / "runs" / "whole" / name).read_bytes()
    look(runs, name, content[: round(share * len(content))])


@fuzz
@given(name=st.sampled_from(FILES), share=st.floats(0, 1), byte=st.sampled_from(BYTES) | st.integers(0, 255))
def test_a_byte_changed_anywhere(runs: Path, name: str, share: float, byte: int) -> None:
    content = bytearray((runs / "runs" / "whole" / name).read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] = byte
    look(runs, name, bytes(content))


@fuzz
@given(name=st.sampled_from(FILES), share=st.floats(0, 1), word=st.sampled_from(WORDS))
def test_a_value_replaced_anywhere(runs: Path, name: str, share: float, word: bytes) -> None:
    content = (runs / "runs" / "whole" / name).read_bytes()
    colons = [at + 2 for at in range(len(content)) if content[at : at + 2] == b": "]
    start = colons[min(int(share * len(colons)), len(colons) - 1)]
    end = min(at for at in range(start, len(content) + 1) if content[at : at + 1] in b",}]\n")
    look(runs, name, content[:start] + word + content[end:])
