"""A model's files are had on each node before ranks load them together."""

from __future__ import annotations

import pytest

from aflora_dist import AFLoRAError
from aflora_dist.options import ModelConfig
from aflora_dist.tasks import model


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, ["model.safetensors"]),
        ({"model.safetensors.index.json"}, ["model.safetensors.index.json", "its shards"]),
        ({"pytorch_model.bin"}, ["pytorch_model.bin"]),
        (set(), None),
    ],
)
def test_the_weights_that_from_pretrained_would_take_are_downloaded(
    there: set[str], fetched: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def cached_file(name: str, file: str, *, revision: str) -> str:
        assert (name, revision) == ("somebody/model", "v2")
        if file not in there:
            raise OSError(f"no {file} in {name}")
        found.append(file)
        return f"/cache/{file}"

    monkeypatch.setattr(model, "_config", lambda *args, **options: None)
    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    shards = "transformers.utils.hub.get_checkpoint_shard_files"
    monkeypatch.setattr(shards, lambda *args, **options: found.append("its shards"))
    config = ModelConfig(name="somebody/model", revision="v2")
    if fetched is None:
        with pytest.raises(AFLoRAError, match=r"could not be loaded: no model\.safetensors in"):
            model.fetch(config, language_model=False)
    else:
        model.fetch(config, language_model=False)
        assert found == fetched
