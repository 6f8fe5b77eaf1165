"""One answer to which files hold a model's weights, for all who ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.weights import local_weight_files, weight_files

WHOLE, PICKLE = "model.safetensors", "pytorch_model.bin"


def index(folder: Path, name: str, files: dict[str, object]) -> None:
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": files}))


def test_a_whole_file_goes_before_an_index_and_safetensors_before_pickles(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == ([], None)
    (tmp_path / "part.bin").touch()
    index(tmp_path, PICKLE, {"a": "part.bin", "b": "part.bin"})
    part = tmp_path / "part.bin"
    assert weight_files(tmp_path) == ([part], {"a": part, "b": part})
    (tmp_path / PICKLE).touch()
    assert weight_files(tmp_path) == ([tmp_path / PICKLE], None)
    (tmp_path / WHOLE).touch()
    assert weight_files(tmp_path) == ([tmp_path / WHOLE], None)
    assert local_weight_files(str(tmp_path), None) == [tmp_path / WHOLE]


def test_a_gguf_file_is_its_own_and_what_is_not_on_this_machine_is_none(tmp_path: Path) -> None:
    assert local_weight_files(str(tmp_path / "a.gguf"), None) == [tmp_path / "a.gguf"]
    assert local_weight_files("nobody/has-this-model", None) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no weight_map"),
        ({"a": "../elsewhere"}, "which is no file in that folder"),
        ({"a": 3}, "which is no file in that folder"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing, which the model's index names"),
    ],
)
def test_an_index_that_cannot_be_followed_is_said(files: dict[str, object], said: str, tmp_path: Path) -> None:
    index(tmp_path, WHOLE, files)
    with pytest.raises(AFLoRAError, match=said):
        weight_files(tmp_path)
