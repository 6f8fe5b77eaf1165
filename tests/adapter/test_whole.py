"""An adapter is saved whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aflora_dist import AFLoRAError
from tests.workers.tiny import build_model


def test_a_state_dict_without_the_frozen_matrices_is_refused(tmp_path: Path) -> None:
    model = build_model()
    trains = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(AFLoRAError, match=r"without all of .*\.A \(it is left out\)"):
        model.save_pretrained(tmp_path, state_dict=trains)
    shards = {name: torch.empty(0) for name in model.state_dict()}  # as under ZeRO-3
    with pytest.raises(AFLoRAError, match=r"0 of its 128 elements"):
        model.save_pretrained(tmp_path, state_dict=shards)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert sum("aflora" in name for name in load_file(tmp_path / "adapter_model.safetensors")) == 4 * 12
