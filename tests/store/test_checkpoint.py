"""Checkpoints as files: damaged ones are named and not used, old ones go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aflora_dist import AFLoRAError
from aflora_dist.store import checkpoint


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda c: flip(c / "state.safetensors"), "state.safetensors has another checksum"),
    "truncated": (lambda c: truncate(c / "training.json"), "training.json has"),
    "emptied": (lambda c: (c / "state.safetensors").write_bytes(b""), "state.safetensors has 0 bytes instead of"),
    "lost": (lambda c: (c / "state.safetensors").unlink(), "state.safetensors is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "foreign manifest": (lambda c: (c / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with three checkpoints of nothing much."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"value/w": torch.full((4,), float(step))}, {"step": step}, keep=3)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(damage: str, small: Path) -> None:
    harm, complaint = DAMAGES[damage]
    harm(small / "step_00000003")
    found, complaints = checkpoint.newest_good(small)
    assert found is not None
    assert found.training["step"] == 2
    assert found.tensors["value/w"].tolist() == [2.0] * 4
    (said,) = complaints
    assert "step_00000003" in said
    assert complaint in said
    with pytest.raises(AFLoRAError, match="is damaged"):
        checkpoint.load(small / "step_00000003")


def test_only_the_last_checkpoints_are_kept_and_unfinished_ones_do_not_count(small: Path) -> None:
    (small / ".step_00000009.tmp").mkdir()
    checkpoint.save(small, 4, {"value/w": torch.zeros(1)}, {}, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(small)] == ["step_00000004", "step_00000003"]


def rewrite(path: Path, training: str) -> None:
    """Another training.json, which fits to the manifest."""
    (path / "training.json").write_text(training)
    (path / "manifest.json").write_text(
        json.dumps({name: checkpoint._fingerprint(path / name) for name in ("state.safetensors", "training.json")})
    )


def test_what_a_user_keeps_beside_checkpoints_is_neither_taken_for_one_nor_deleted(small: Path) -> None:
    kept = ["step_00000003_good", "step_backup", "step_good", "step_3"]
    for name in kept:
        shutil.copytree(small / "step_00000003", small / name)
    (small / "step_00000009").write_text("a note")
    for step in (4, 5):
        checkpoint.save(small, step, {"value/w": torch.zeros(1)}, {"step": step}, keep=1)
        assert [path.name for path in checkpoint.list_checkpoints(small)] == [f"step_{step:08d}"]
    assert all((small / name).is_dir() for name in kept)
    found, _ = checkpoint.newest_good(small)
    assert found is not None
    assert found.training["step"] == 5


@pytest.mark.parametrize("training", ["[]", "null", "3"])
def test_a_training_json_of_another_kind_is_damaged(training: str, small: Path) -> None:
    rewrite(small / "step_00000003", training)
    found, (complaint,) = checkpoint.newest_good(small)
    assert found is not None
    assert found.training["step"] == 2
    assert "training.json holds no names" in complaint


def test_another_format_is_refused(small: Path) -> None:
    path = small / "step_00000003"
    rewrite(path, json.dumps({"format": 99}))
    with pytest.raises(AFLoRAError, match=r"has format 99; this version of aflora_dist reads 3\. Finish"):
        checkpoint.load(path)
