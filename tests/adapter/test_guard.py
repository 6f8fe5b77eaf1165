"""A training whose freezing was forgotten is refused at its second step, whichever way the layers came there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from aflora_dist.adapter import Adapted, AFLoRALayer
from aflora_dist.compat.contract import is_older
from aflora_dist.compat.transformers import checkpoint_activations
from aflora_dist.errors import StepError
from tests.small import add_by_transformers

TOKENS, LABELS = torch.arange(1, 13).view(2, 6), torch.tensor([0, 1])


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(config).train()


def with_task(config: AFLoRAConfig) -> nn.Module:
    config.task_type = "SEQ_CLS"
    return get_peft_model(bert(), config)


def added(config: AFLoRAConfig) -> nn.Module:
    model = bert()
    add_by_transformers(model, config)
    return model


def second(config: AFLoRAConfig) -> nn.Module:
    model = get_peft_model(bert(), AFLoRAConfig(r=2, freezing="never"))
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


WAYS: dict[str, Callable[[AFLoRAConfig], nn.Module]] = {
    "get_peft_model": with_task,
    "no task_type": lambda config: get_peft_model(bert(), config),
    "transformers' add_adapter": added,
    "inject_adapter_in_model": lambda config: inject_adapter_in_model(config, bert()),
    "a second adapter": second,
}


def loss_of(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, labels=LABELS).loss


def step(model: nn.Module, forwards: int = 1) -> None:
    """Anything else than an update of nothing: what trains gets a gradient."""
    model.zero_grad()
    sum(loss_of(model) for _ in range(forwards)).backward()  # type: ignore[union-attr]
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_a_second_step_is_refused(way: str) -> None:
    model = WAYS[way](AFLoRAConfig(r=2))
    step(model)
    with pytest.raises(StepError, match="nothing freezes it"):
        step(model)


@pytest.mark.parametrize("options", [{"freezing": "never"}, {"freezing": "always"}, {"freezable": "none"}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_who_is_not_to_freeze_adaptively_trains(way: str, options: dict[str, Any]) -> None:
    model = WAYS[way](AFLoRAConfig(r=2, **options))
    for _ in range(3):
        step(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_may_run_forward_as_often_as_it_likes(way: str) -> None:
    model = WAYS[way](AFLoRAConfig(r=2))
    for _ in range(3):
        loss_of(model)  # train mode, gradients on, but nothing is trained
    step(model, forwards=2)
    with torch.no_grad():
        loss_of(model)
    with pytest.raises(StepError, match="nothing freezes it"):
        loss_of(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_recomputations_are_no_steps(way: str, reentrant: bool) -> None:
    model: Any = WAYS[way](AFLoRAConfig(r=2))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    checkpoint_activations(base, use_reentrant=reentrant)
    base.enable_input_require_grads()
    step(model, forwards=2)
    with pytest.raises(StepError, match="nothing freezes it"):
        step(model)


@pytest.mark.parametrize("way", WAYS)
def test_who_does_not_train_the_adapter_is_not_refused(way: str) -> None:
    model: Any = WAYS[way](AFLoRAConfig(r=2))
    for layer in model.modules():
        if isinstance(layer, AFLoRALayer):
            layer.enable_adapters(False)  # switched off, in train mode
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.bert.embeddings.requires_grad_(True)
    for _ in range(3):
        step(model)


def test_a_loaded_adapter_that_does_not_train_is_not_refused(tmp_path: Any) -> None:
    with_task(AFLoRAConfig(r=2)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).train()
    trained = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True).train()
    injected: Any = bert()
    if is_older("transformers", "5.18"):
        add_by_transformers(injected, AFLoRAConfig(r=2))  # whose own load_adapter() is refused
    else:
        injected.load_adapter(str(tmp_path))
    for model in (loaded, trained, injected.train()):
        model.get_submodule("base_model.model.bert" if isinstance(model, PeftModel) else "bert").requires_grad_(True)
    for parameters in (loaded, injected):
        for name, parameter in parameters.named_parameters():
            if ".aflora." in name:
                parameter.requires_grad_(False)
    for _ in range(3):
        step(loaded)
        step(injected)
    step(trained)
    with pytest.raises(StepError, match="nothing freezes it"):
        step(trained)


def test_inference_of_a_model_in_train_mode_is_not_refused() -> None:
    model = with_task(AFLoRAConfig(r=2))
    for _ in range(3):
        with torch.no_grad():
            loss_of(model)
        with torch.inference_mode():
            loss_of(model)


@pytest.mark.parametrize("way", WAYS)
def test_attached_it_trains_detached_it_trains_on_released_it_does_not(way: str) -> None:
    model = WAYS[way](AFLoRAConfig(r=2))
    step(model)  # one step before is not too late
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    config = FreezingConfig(total_steps=10, initial_steps=1, final_steps=1)

    def train(steps: int) -> None:
        for _ in range(steps):
            accelerator.backward(loss_of(model))
            optimizer.step()
            optimizer.zero_grad()

    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    train(2)
    freezing.release()
    train(1)
    with pytest.raises(StepError, match="nothing freezes it"):
        train(1)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    train(2)
    freezing.detach()
    train(3)


@pytest.mark.parametrize("way", WAYS)
def test_what_freezes_finds_the_layers_of_every_way(way: str) -> None:
    model = WAYS[way](AFLoRAConfig(r=2))
    adapted = Adapted(model)
    assert not adapted.freezing_attached
    assert len(adapted.roots) == 1
    assert isinstance(adapted.roots[0], BertForSequenceClassification)
    found = adapted.freezable_matrices()
    parameters = dict(model.named_parameters())
    assert len(found) == 8  # A and B of two feed-forward layers in each of two blocks
    assert all(parameters[name] is matrix and matrix.requires_grad for name, matrix in found.items())
    adapted.attach(model, model)  # by whoever is there
    for _ in range(3):
        step(model)
    adapted.detach(waived=True)
    for _ in range(3):
        step(model)


def test_the_layers_of_a_copy_have_one_guard_of_their_own() -> None:
    model = with_task(AFLoRAConfig(r=2))
    step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = [m for m in twin.modules() if isinstance(m, AFLoRALayer)]
        assert len({id(layer.guard) for layer in layers}) == 1
        Adapted(twin).attach(twin, twin)
        step(twin)
    with pytest.raises(StepError, match="nothing freezes it"):
        step(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["get_peft_model", "no task_type", "inject_adapter_in_model"])
def test_compiled_training_is_refused_too_and_the_guard_compiles_nothing_anew(way: str, dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu())

    config = AFLoRAConfig(r=2, target_modules=["up", "down"], freezable="all")
    net = Net().to(dtype)
    model = inject_adapter_in_model(config, net) if way.startswith("inject") else get_peft_model(net, config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6, dtype=dtype)
    (compiled(x) + compiled(x)).sum().backward()
    with pytest.raises(StepError, match="nothing freezes it"):
        compiled(x).sum().backward()
    (guard,) = {m.guard for m in model.modules() if isinstance(m, AFLoRALayer)}
    guard.attached = True
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            compiled(x).sum().backward()
