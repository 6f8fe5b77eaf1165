"""How many kernels an adapted layer adds to a step, on DeBERTaV3-base's shape, beside PEFT's LoRA."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from aflora_dist import AFLoRAConfig
from profiling.launches import count_calls, count_launches, per_call
from profiling.methods import shared_copy
from profiling.models import build

TARGETS = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]  # of DeBERTaV3


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return build("deberta-v3-base", 2)


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if f".{n}".endswith(tuple(f".{target}" for target in TARGETS))]


def launches(model: nn.Module, dtype: torch.dtype) -> Counter[str]:
    batch = {"input_ids": torch.randint(5, 100, (2, 16)), "labels": torch.tensor([0, 1])}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = model.train()(**batch).loss
        loss.backward()

    step()  # what is kept between steps is there then
    return count_launches(step)


@pytest.fixture(scope="module")
def floor(base: nn.Module) -> tuple[Counter[str], int]:
    """The frozen backbone in float32, its gradients started at the adapted layers' outputs; and their calls."""
    model = shared_copy(base)
    layers = adapted_layers(model)
    calls = count_calls(layers, lambda: model(torch.randint(5, 100, (2, 16))))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, y: y if y.requires_grad else y.requires_grad_())
    return launches(model, torch.float32), calls


# How many launches a call takes at most: (all matrices frozen, all training).
LIMITS = {torch.float32: (6, 8), torch.bfloat16: (8, 10)}


@pytest.mark.parametrize("dtype", LIMITS)
def test_an_adapted_layer_takes_fewer_launches_than_lora(
    base: nn.Module, floor: tuple[Counter[str], int], dtype: torch.dtype
) -> None:
    counts, calls = floor
    assert calls == 16  # query and key projections are called twice a layer

    def added(config: Any) -> float:
        return per_call(launches(get_peft_model(shared_copy(base), config), dtype), counts, calls)

    frozen = added(AFLoRAConfig(r=4, target_modules=TARGETS, freezing="always"))
    training = added(AFLoRAConfig(r=4, target_modules=TARGETS, freezing="never", freezable="all"))
    lora = added(LoraConfig(r=8, target_modules=TARGETS))
    assert lora == pytest.approx({torch.float32: 9.6, torch.bfloat16: 18.9}[dtype], abs=0.05)
    most_frozen, most_training = LIMITS[dtype]
    assert frozen <= most_frozen
    assert frozen < training <= most_training
    print(f"{dtype}: frozen {frozen:.2f}, training {training:.2f}, LoRA {lora:.2f}")


def test_what_is_folded_does_not_grow_with_the_number_of_layers() -> None:
    """The launches that a model adds beyond its layers' calls are the same for two layers and for four."""

    def beyond_calls(layers: int) -> int:
        torch.manual_seed(0)
        config = AFLoRAConfig(r=4, target_modules=TARGETS, freezing="always")
        found = launches(get_peft_model(build("bert-base", layers), config), torch.float32)
        return found["aten.cat.default"] + found["aten.stack.default"] + found["aten.index_select.default"]

    assert beyond_calls(2) == beyond_calls(4)
