"""Hooks that cast a layer's output, and where they stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForSequenceClassification

from aflora_dist.methods.autocast import match_autocast


@pytest.mark.parametrize(
    ("config", "autocast", "stay"),
    [
        (LoraConfig(target_modules=["query", "value"]), True, False),
        (VeraConfig(target_modules=["query", "value"], r=4), True, True),  # returns float32
        (VeraConfig(target_modules=["query", "value"], r=4), False, False),
    ],
    ids=["lora", "vera", "vera-float32"],
)
def test_a_hook_stays_on_the_layers_alone_that_need_it(
    config: Any, autocast: bool, stay: bool, tiny_model: Path
) -> None:
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny_model), config)
    match_autocast(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    seen: list[torch.dtype] = []
    for _ in range(2):
        for training in (False, True):  # an evaluation decides nothing
            model.train(training)
            handle = layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(torch.ones(1, 4, dtype=torch.long))
            handle.remove()
    assert {bool(layer._forward_hooks) for layer in layers} == {stay}
    assert set(seen) == {torch.bfloat16 if autocast else torch.float32}
