"""TRL's trainers with FreezingCallback: supervised fine-tuning, preferences, rewards, and reinforcement learning."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.selection import is_chosen
from tests.test_trainer import EVERY, FOURTHS, assert_close, assert_same_log, loop, marked, plain, run, saved
from tests.test_trainer import trained as trainers

pytest.importorskip("trl")
KINDS = ("sft", "dpo", "reward", "grpo")
PAIRS = [(engine, kind) for engine in EVERY for kind in (("sft",) if engine == "zero1" else KINDS)]


@cache
def trained(engine: str) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder, and what the ranks saw of a training with each trainer."""
    folder = Path(mkdtemp(prefix=f"trl-{engine}-"))
    kinds = [kind for place, kind in PAIRS if place == engine and is_wanted(engine, kind)]
    seen = run(engine, *([str(folder / kind), "--trl", kind, "--options", json.dumps(FOURTHS)] for kind in kinds))
    return folder, dict(zip(kinds, seen, strict=True))


def is_wanted(engine: str, kind: str) -> bool:
    """Whether a test that is run looks at this training."""
    if kind == "sft" and is_chosen(f"tests/test_trl.py::{test_sft_freezes_as_an_own_loop_does.__name__}[{engine}]"):
        return True
    pairs = [(engine, kind)]
    pairs += [(place, kind) for place in EVERY if engine == "single"]  # what preferences and rewards are held against
    tests = (
        test_preferences_and_rewards_freeze_the_same_on_every_engine,
        test_all_freezes_and_the_whole_adapter_is_saved,
        test_resuming_is_exact,
    )
    return any(is_chosen(f"tests/test_trl.py::{test.__name__}[{e}-{k}]") for test in tests for e, k in pairs)


def each(kinds: tuple[str, ...]) -> Any:
    pairs = [(e, k, [] if e == "single" else pytest.mark.distributed) for e, k in PAIRS if k in kinds]
    return pytest.mark.parametrize(("engine", "kind"), [pytest.param(e, k, marks=m) for e, k, m in pairs])


@pytest.mark.parametrize("engine", marked(EVERY))
def test_sft_freezes_as_an_own_loop_does(engine: str) -> None:
    for rank in trained(engine)[1]["sft"]:
        assert rank["kind"] == engine
        assert_same_log(rank["events"], loop())


@pytest.mark.parametrize("engine", marked(("single", "zero2", "fsdp2")))
def test_sft_of_lora_freezes_as_trainer_does(engine: str, tmp_path: Path) -> None:
    """With another score, unit and pattern, and a prefix."""
    (seen,) = run(engine, [str(tmp_path / "sft"), "--trl", "sft", "--lora"])
    for rank in seen:
        assert_same_log(rank["events"], trainers("single")[3][0]["events"], rel=1e-4)


@each(("dpo", "reward"))
def test_preferences_and_rewards_freeze_the_same_on_every_engine(engine: str, kind: str) -> None:
    (one, *_) = trained("single")[1][kind]
    for rank in trained(engine)[1][kind]:
        assert_same_log(rank["events"], one["events"], rel=1e-3)
    assert one["events"][-1]["remaining"] == 0


@each(KINDS)
def test_all_freezes_and_the_whole_adapter_is_saved(engine: str, kind: str) -> None:
    folder, seen = trained(engine)
    (first, *_) = seen[kind]
    assert first["events"][-1]["remaining"] == 0
    adapter = {name: value for name, value in plain(first["values"]).items() if ".ref." not in name}  # DPO's
    written = saved(folder / kind / "model")
    assert_close(adapter, {name: written[name] for name in adapter}, 0.0)


@each(("sft", "dpo"))
def test_resuming_is_exact(engine: str, kind: str, tmp_path: Path) -> None:
    folder, seen = trained(engine)
    checkpoint = str(folder / kind / "checkpoint-4")
    ((first, *_),) = run(engine, [str(tmp_path), "--trl", kind, "--resume", checkpoint])
    assert_same_log(first["events"], seen[kind][0]["events"], rel=1e-12, since=4)
    assert_close(first["values"], seen[kind][0]["values"], 0.0)
