"""What is too deep is a number of ours, whatever Python's stack would bear, and however full it is already."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aflora_dist.serve import source
from aflora_dist.store import records
from aflora_dist.training import deepspeed_file
from aflora_dist.training.config_file import look_through
from aflora_dist.untrusted import DEEPEST, load_json, refuse_deep_json, refuse_deep_yaml


def within(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.fixture(params=[None, 200_000], ids=["limit of Python", "limit raised"])
def stack(request: pytest.FixtureRequest) -> Any:
    """As libraries do that need a deep one."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(request.param or before)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("stack")
def test_one_level_more_than_the_deepest_is_refused_with_its_place() -> None:
    assert load_json(within(DEEPEST)) == load_json(within(DEEPEST).encode("utf-16")) == json.loads(within(DEEPEST))
    refuse_deep_yaml(within(DEEPEST), yaml.SafeLoader)
    for levels in (DEEPEST + 1, 20_000):
        with pytest.raises(json.JSONDecodeError, match="nested too deeply") as found:
            load_json(f"\n\n {within(levels)}")
        assert (found.value.lineno, found.value.colno) == (3, DEEPEST + 2)
        with pytest.raises(yaml.MarkedYAMLError, match="nested too deeply"):
            refuse_deep_yaml(within(levels), yaml.SafeLoader)


@pytest.mark.parametrize(
    "text", ["[" + within(1) + ", []" * 200 + "]", json.dumps("[" * 200), json.dumps({'"\\[' * 200: "{" * 200})]
)
def test_what_is_wide_or_only_text_is_not_deep(text: str) -> None:
    refuse_deep_json(text)
    refuse_deep_yaml(text, yaml.SafeLoader)


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml of a run": lambda path: records.read_config(path.parent),
    "options": lambda path: look_through(str(path), (), {}),
    "an adapter": lambda path: source.read_adapter(path.parent),
    "DeepSpeed's file": lambda path: deepspeed_file._read(str(path)),
}


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_it(reader: str, tmp_path: Path) -> None:
    path = tmp_path / ("adapter_config.json" if reader == "an adapter" else "config.yaml")
    path.write_text(within(DEEPEST + 1))
    with pytest.raises(ValueError, match="nested too deeply"):
        READERS[reader](path)
