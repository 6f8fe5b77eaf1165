"""What has frozen stays so when PEFT switches adapters, which lets all of an adapter train again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from tests.launch import launch_series
from tests.workers.anything import Training
from tests.workers.tiny import build_base, global_batch

STEPS = 8
CONFIG = FreezingConfig(total_steps=STEPS, initial_steps=1, final_steps=5)
PREFIX = FreezingConfig(**{**vars(CONFIG), "prefix": True, "prefix_steps": 5})
TARGETS = ["query", "value"]


def disabled(model: Any) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(**global_batch(0))


def chosen(model: Any) -> None:
    model.set_adapter("default")


CASES: dict[str, tuple[Any, FreezingConfig, Any]] = {
    "lora": (LoraConfig(target_modules=TARGETS, init_lora_weights=False), CONFIG, None),
    "loha": (LoHaConfig(target_modules=TARGETS, init_weights=False), CONFIG, r".*hada_w\d_a.*"),
    "a whole module": (AFLoRAConfig(modules_to_save=["pooler"]), CONFIG, r".*pooler.*weight|.*\.aflora.*\.[AB]"),
    "a prefix": (AFLoRAConfig(modules_to_save=["LayerNorm"]), PREFIX, None),
}


def train(
    case: str, switch: Callable[[Any], None] | None, steps: int = STEPS, model: Any = None
) -> tuple[nn.Module, list[float], AdaptiveFreezing]:
    """A loop in which `switch` is called between the forward pass and the backward pass; gradients are clipped."""
    torch.manual_seed(0)
    config, freezing_config, freezable = CASES[case]
    config.task_type = "SEQ_CLS"
    model = model or get_peft_model(build_base(), config)
    accelerator = Accelerator(cpu=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    freezing = AdaptiveFreezing(accelerator, model, optimizer, freezing_config, freezable=freezable)
    norms = []
    for step in range(steps):
        loss = model(**global_batch(step)).loss
        if switch is not None:
            switch(model)
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.05) or 0))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms, freezing


@pytest.mark.parametrize("switch", [disabled, chosen])
@pytest.mark.parametrize("case", CASES)
def test_a_training_with_a_reference_is_the_training_without(case: str, switch: Callable[[Any], None]) -> None:
    expected, expected_norms, _ = train(case, None)
    model, norms, freezing = train(case, switch)
    assert norms == expected_norms
    assert freezing.frozen
    for (name, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name
        assert name not in freezing.frozen or value.grad is None
    switch(model)
    freezing.detach()
    assert not [name for name, value in model.named_parameters() if name in freezing.frozen and value.requires_grad]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [lambda model: torch.compile(model, backend="eager"), in_place])
@pytest.mark.parametrize("config", [LoraConfig, AFLoRAConfig])
def test_in_a_compiled_model_too(config: Any, compiled: Callable[[Any], Any]) -> None:
    """Where hooks of layers are compiled with them; a reference model as DPO takes it."""
    values, norms = [], []
    for reference in (False, True):
        torch.manual_seed(0)
        base = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)), nn.Linear(4, 2))
        options = {"init_lora_weights": False} if config is LoraConfig else {"init_weights": False, "freezable": "all"}
        model = get_peft_model(base, config(r=2, target_modules=["0.0", "1.0"], modules_to_save=["2"], **options))
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        called, optimizer = accelerator.prepare(compiled(model), optimizer)
        freezing = AdaptiveFreezing(accelerator, called, optimizer, CONFIG)
        for step in range(STEPS):
            torch.manual_seed(step)
            x = torch.randn(4, 4)
            if reference:
                with torch.no_grad(), model.disable_adapter():
                    called(x)
            accelerator.backward(called(x).pow(2).mean())
            norms.append(float(accelerator.clip_grad_norm_(called.parameters(), 0.05) or 0))
            optimizer.step()
            optimizer.zero_grad()
        assert len(freezing.frozen) == 4
        values.append([*model.parameters()])
        freezing.detach()
        torch._dynamo.reset()
    assert norms[:STEPS] == norms[STEPS:]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_recomputed_activations_are_those_of_the_forward_pass() -> None:
    values = {}
    for reference in (False, True):
        training = Training("lora", recompute=True, clip=0.05, reference=reference)
        training.train(0, 8)
        values[reference] = training.values()
        assert training.freezing.frozen
    assert values[True].keys() == values[False].keys()
    assert all(torch.equal(value, values[False][name]) for name, value in values[True].items())


def test_an_adapter_that_was_deleted_is_asked_for_nothing() -> None:
    model, _, freezing = train("loha", None)
    model.add_adapter("other", CASES["loha"][0])
    model.set_adapter("other")
    model.delete_adapter("default")
    model(**global_batch(0))
    freezing.detach()


@pytest.mark.parametrize("steps", [4, STEPS])  # stopped early: some are yet to freeze
@pytest.mark.parametrize("switch", [disabled, chosen])
@pytest.mark.parametrize("case", CASES)
def test_a_second_training_after_a_switch_is_that_without(case: str, switch: Callable[[Any], None], steps: int) -> None:
    models: list[Any] = []
    seen = []
    for between in (None, switch):
        model, _, first = train(case, None, steps)
        first.release()
        if between is not None:
            between(model)
        gone = {name: p.detach().clone() for name, p in model.named_parameters() if name in first.frozen}
        _, norms, second = train(case, between, model=model)
        assert gone
        assert all(torch.equal(model.get_parameter(name), value) for name, value in gone.items())
        assert not gone.keys() & {*second.engine.trainable, *second.frozen}
        seen.append((norms, second.frozen))
        second.release()
        models.append(model)
    assert seen[0] == seen[1]
    for (name, value), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(value, other), name


def test_what_an_earlier_checkpoint_brought_back_may_freeze_in_a_second_training() -> None:
    training = Training("lora")
    training.train(0, 1)
    state = training.freezing.progress.snapshot()
    training.train(1, 12)
    everything = training.freezing.freezable
    assert training.freezing.frozen
    training.freezing.progress.restore(*state)
    training.freezing.release()
    training.model.base_model.set_adapter("default")
    again = AdaptiveFreezing(training.accelerator, training.model, training.optimizer, training.freezing.config)
    assert again.freezable == everything
    again.release()


@pytest.mark.parametrize("case", ["lora", "loha"])
def test_an_adapter_made_anew_under_the_name_of_one_that_froze_trains(case: str) -> None:
    model, _, first = train(case, None)
    first.release()
    model.add_adapter("other", CASES[case][0])
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", CASES[case][0])
    model.set_adapter("default")
    _, _, second = train(case, None, model=model)
    assert second.frozen.keys() == first.frozen.keys()
    second.release()


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_second_training_after_a_switch_is_that_without_on_every_engine(engine: str, tmp_path: Path) -> None:
    """The second optimizer was given what had frozen, and lets go of it on every rank."""
    module = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
    launch_series(engine, 2, [[*module, "tests.workers.switched", str(tmp_path)]])
    for rank in range(2):
        seen = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert seen[True]["kind"] == engine
        assert seen[True]["gone"]
        for name, value in seen[True]["gone"].items():
            assert torch.equal(value, seen[True]["now"][name]), name
        assert not seen[True]["gone"].keys() & {*seen[True]["trained"]}
        assert seen[True]["events"] == seen[False]["events"]
        assert seen[True]["losses"] == pytest.approx(seen[False]["losses"], abs=1e-6)
