"""torch.compile: a freeze must not compile the model anew, and nothing may be computed differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig

STEPS = 60


class Net(nn.Module):
    """24 small layers: 48 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for _ in range(12) for sizes in ((6, 8), (8, 6)))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + second(first(x).relu())
        return x


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Net(), AFLoRAConfig(r=2, target_modules=r"layers\.\d+", freezable="all"))


def train(
    prepare: Callable[[nn.Module], nn.Module], *, steps: int = STEPS, **accelerator: Any
) -> tuple[list[float], AdaptiveFreezing, int]:
    """Losses, the freezing, and how many graphs were compiled."""
    torch._dynamo.reset()
    counters.clear()
    AcceleratorState._reset_state()  # which holds what is to be compiled
    accelerate = Accelerator(cpu=True, **accelerator)
    model = prepare(model_of())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerate.prepare(model, optimizer)
    config = FreezingConfig(total_steps=steps, initial_steps=2, final_steps=5)
    freezing = AdaptiveFreezing(accelerate, model, optimizer, config)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 6, generator=generator)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        accelerate.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    graphs = counters["stats"]["unique_graphs"]
    freezing.release()
    return losses, freezing, graphs


@pytest.fixture(scope="module")
def eager() -> tuple[list[float], list[Any]]:
    losses, freezing, graphs = train(lambda model: model)
    assert graphs == 0
    assert len(freezing.freezable) == 48
    assert not freezing.remaining
    return losses, [event.frozen for event in freezing.events]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


REGIONS = TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=True)
WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, Any]]] = {
    "accelerate": (lambda model: model, {"dynamo_backend": "aot_eager"}),
    "accelerate, by region": (lambda model: model, {"dynamo_plugin": REGIONS}),
    "one graph": (lambda model: torch.compile(model, backend="aot_eager", fullgraph=True), {}),
    "in place": (in_place, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_forty_eight_freezes_compile_at_most_eight_times(way: str, eager: tuple[list[float], list[Any]]) -> None:
    prepare, options = WAYS[way]
    losses, freezing, graphs = train(prepare, **options)
    assert losses == pytest.approx(eager[0], rel=1e-4)
    assert [event.frozen for event in freezing.events] == eager[1]
    assert 0 < graphs <= 8
    assert counters["frames"].get("total") == counters["frames"].get("ok")  # nothing was left to run eagerly
    print(way, graphs)
