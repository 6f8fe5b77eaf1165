"""A copy of a model that is being frozen, and one read from a file, is a model that never met freezing."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from tests.workers.tiny import build_base, global_batch

STEPS = 6
LORA = LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
NORMS = AFLoRAConfig(modules_to_save=["LayerNorm"], task_type="SEQ_CLS", init_weights=False)
CASES: dict[str, tuple[Any, bool]] = {
    "lora": (LORA, False),
    "lora, a prefix": (LORA, True),
    "full": (None, False),
    "full, a prefix": (None, True),
    "aflora": (NORMS, False),
    "aflora, a prefix": (NORMS, True),
}


def through_a_file(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CASES[case][0])
    return build_base() if config is None else get_peft_model(build_base(), config)


def freeze(case: str) -> tuple[Any, AdaptiveFreezing]:
    """A training to its end, whose freezing is still attached."""
    accelerator, model = Accelerator(cpu=True), build(case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    prefix = {"prefix": True, "prefix_steps": 3} if CASES[case][1] else {}
    config = FreezingConfig(total_steps=STEPS, initial_steps=1, final_steps=3, **prefix)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    for step in range(STEPS):
        accelerator.backward(model(**global_batch(step)).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model, freezing


def train(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of it, without freezing: the parameters afterwards."""
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        model(**global_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
@pytest.mark.parametrize("case", CASES)
def test_a_copy_trains_as_a_model_that_never_met_freezing(case: str, copied: Callable[[Any], Any]) -> None:
    model, freezing = freeze(case)
    assert freezing.frozen
    assert (freezing.events[-1].backward_from > 0) is CASES[case][1]
    never = build(case)
    never.load_state_dict(model.state_dict())
    for each in (twin := copied(model)), never:
        for module in each.modules():
            if guard := getattr(module, "guard", None):
                guard.waived = True
    found, expected = train(twin), train(never)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    model(**global_batch(0))
    assert not [name for name, value in model.named_parameters() if name in freezing.frozen and value.requires_grad]


def test_files_of_models_without_our_layers_are_read_without_this_package(tmp_path: Path) -> None:
    """By one other process, which takes most of a dozen seconds to start."""
    cases = [case for case in CASES if "aflora" not in case]
    for case in cases:
        torch.save(freeze(case)[0], tmp_path / case)
    read = (
        "import sys, torch\n"
        "sys.modules['aflora_dist'] = None\n"
        "for file in sys.argv[1:]:\n"
        "    model = torch.load(file, weights_only=False).requires_grad_(True)\n"
        "    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([0])).loss.backward()\n"
        "    print(file, 'was read')"
    )
    done = subprocess.run([sys.executable, "-c", read, *(str(tmp_path / case) for case in cases)], capture_output=True)
    assert done.stdout.count(b"was read") == len(cases) > 3, done.stderr.decode()
