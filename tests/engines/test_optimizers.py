"""Which optimizers freeze and resume to the bit, and which are refused when freezing is attached."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from aflora_dist import AdaptiveFreezing, AFLoRAError
from aflora_dist.engines import create_engine
from tests.loop import CONFIG, Create, Loop, assert_same
from tests.workers.tiny import build_model, build_optimizer, global_batch


class MyAdamW(torch.optim.AdamW):
    """A subclass, as people make them."""


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as its packages write it: no step count, one moment, its own options."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_((m * group["betas"][0] + p.grad * (1 - group["betas"][0])).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["betas"][1])


class Counting(Lion):
    """Keeps a count in its param groups, as schedule-free optimizers and Prodigy do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"], kept = group["lr"] / group["k"], group["lr"]
        super().step()
        for group in self.param_groups:
            group["lr"] = kept


class NormScaled(Lion):
    """LAMB's kind: an element's update depends on the norm of its tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class Blockwise(Lion):
    """bitsandbytes' 8-bit kind: a scale for each block of 256 elements."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["absmax1"] = torch.ones(-(-p.numel() // 256))


class Coupled(Lion):
    """Scales by the norm of all gradients together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        whole = torch.stack([p.grad.norm() for p in found]).norm()
        for p in found:
            p.sub_(p.grad / whole, alpha=0.01)


class ScheduleFree(Lion):
    """Defazio et al. 2024: other weights in evaluation than in training."""

    def eval(self) -> None: ...


EXACT: dict[str, Create] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "a subclass of AdamW": lambda p: MyAdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "Lion": lambda p: Lion(p, lr=1e-3),
    "state in the param groups": lambda p: Counting(p, lr=1e-2),
}


REFUSED: dict[str, tuple[Create, str]] = {
    "torch's Adafactor": (lambda p: torch.optim.Adafactor(p), "keeps 'row_var'"),
    "transformers' Adafactor": (lambda p: transformers.Adafactor(p), "keeps 'exp_avg_sq_row'"),
    "by tensor": (lambda p: NormScaled(p), "depends on other elements"),
    "by block": (lambda p: Blockwise(p), "keeps 'absmax1'"),
    "all together": (lambda p: Coupled(p), "change when another one leaves"),
    "schedule-free": (lambda p: ScheduleFree(p), "other weights in training than in evaluation"),
    "LBFGS": (lambda p: torch.optim.LBFGS(p), "cannot be tried out"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p), "cannot be tried out"),
    "of another's name": (lambda p: type("AdamW", (torch.optim.LBFGS,), {})(p), r"tests\.AdamW cannot be tried out"),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_optimizer_that_treats_each_element_by_itself_freezes_and_resumes_to_the_bit(name: str) -> None:
    whole, cut = Loop(optimizer=EXACT[name]), Loop(optimizer=EXACT[name])
    whole.train()
    assert not whole.freezing.remaining
    cut.train(0, 6)
    tensors, record = cut.freezing.progress.snapshot()
    record = json.loads(json.dumps(record))
    cut.train(6, 12)  # what follows does not change the snapshot
    resumed = Loop(optimizer=EXACT[name])
    resumed.freezing.progress.restore(tensors, record)
    assert resumed.freezing.step == 6
    resumed.train(6, 12)
    for loop in (cut, resumed):
        assert_same(loop.weights(), whole.weights())
        assert [(e.step, e.frozen) for e in loop.freezing.events] == [(e.step, e.frozen) for e in whole.freezing.events]
        assert [e.scores for e in loop.freezing.events if e.step >= 6] == [
            e.scores for e in whole.freezing.events if e.step >= 6
        ]


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_be_exact_is_refused_when_attached(name: str) -> None:
    create, said = REFUSED[name]
    with pytest.raises(AFLoRAError, match=said) as refused:
        Loop(optimizer=create)
    assert "torch.optim.AdamW" in str(refused.value)


def test_trying_an_optimizer_out_leaves_it_and_the_random_numbers_alone() -> None:
    torch.manual_seed(7)
    model = build_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    numbers = torch.get_rng_state()
    AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not optimizer.state
    assert_same({n: p.detach() for n, p in model.named_parameters()}, before)


def test_what_is_no_optimizer_or_lies_on_two_devices_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    prepared = accelerator.prepare(model, optimizer)
    for wrong in (None, [optimizer], torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), model):
        with pytest.raises(AFLoRAError, match="as its optimizer"):
            AdaptiveFreezing(accelerator, prepared[0], wrong, CONFIG)  # type: ignore[arg-type]
    spread = build_model()
    spread.base_model.model.classifier.to("meta")  # stands for a second device
    optimizer = torch.optim.AdamW([p for p in spread.parameters() if p.requires_grad])
    with pytest.raises(AFLoRAError, match=r"spread over cpu, meta \(device_map\?\)"):
        AdaptiveFreezing(accelerator, spread, optimizer, CONFIG)


def groups_of(first: dict[str, Any], second: dict[str, Any]) -> Callable[[list[nn.Parameter]], list[dict[str, Any]]]:
    return lambda p: [{"params": p[::2], **first}, {"params": p[1::2], **second}]


MIXED: dict[str, Create] = {
    "amsgrad in the second group": lambda p: torch.optim.AdamW(groups_of({}, {"amsgrad": True})(p), lr=1e-2),
    "momentum in the second group": lambda p: torch.optim.SGD(groups_of({}, {"momentum": 0.9})(p), lr=0.1),
    "momentum in the first group": lambda p: torch.optim.SGD(groups_of({"momentum": 0.9}, {})(p), lr=0.1),
    "a rate that is a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "named parameters": lambda p: torch.optim.AdamW([(f"p{i}", q) for i, q in enumerate(p)], lr=1e-2),
}


@pytest.mark.parametrize("name", MIXED)
def test_param_groups_of_different_kinds_resume_to_the_bit_and_are_not_touched_by_attaching(name: str) -> None:
    whole, cut, again = (Loop(optimizer=MIXED[name]) for _ in range(3))
    whole.train()
    cut.train(0, 6)
    cut.freezing.progress.snapshot()
    tensors, record = cut.freezing.progress.snapshot()
    again.freezing.progress.restore(tensors, json.loads(json.dumps(record)))
    again.train(6, 12)
    assert_same(again.weights(), whole.weights())
    # attached in the middle of a training, the rehearsal leaves the optimizer's state as it is
    before = {key: dict(state) for key, state in cut.optimizer.optimizer.state.items()}
    cut.freezing.release()
    cut.freezing = AdaptiveFreezing(cut.accelerator, cut.model, cut.optimizer, CONFIG)
    after = cut.optimizer.optimizer.state
    assert {key: set(state) for key, state in after.items()} == {key: set(state) for key, state in before.items()}
    for group in again.optimizer.param_groups:
        assert len(group.get("param_names", group["params"])) == len(group["params"])


def test_what_trains_in_half_precision_is_named_and_what_only_lies_there_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    accelerator, model = Accelerator(cpu=True), build_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            parameter.data = parameter.data.float()

    def said() -> str:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        create_engine(accelerator, *accelerator.prepare(model, optimizer))
        return capsys.readouterr().err

    assert "s_d is the first) are held in half precision" in said()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    assert said() == ""


def test_a_bf16_base_with_a_float32_adapter_resumes_to_the_bit() -> None:
    """PEFT's default: adapters are float32, the head has the base's dtype."""

    def loop() -> Loop:
        return Loop(optimizer=lambda p: torch.optim.AdamW(sorted(p, key=lambda q: q.dtype != torch.bfloat16), lr=1e-2))

    original = build_model

    def build(**adapter: Any) -> Any:
        model = original(**adapter)
        for name, parameter in model.named_parameters():
            if "aflora" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.loop.build_model", build)
        whole, cut, again = loop(), loop(), loop()
    whole.train()
    cut.train(0, 6)
    again.freezing.progress.restore(*cut.freezing.progress.snapshot())
    again.train(6, 12)
    assert_same(again.weights(), whole.weights())


class Lookahead(torch.optim.Optimizer):
    """Zhang et al. 2019: an optimizer around another one, with slow weights of its own."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base

    def step(self, closure: Any = None) -> None:
        self.base.step()


def test_an_optimizer_around_another_one_is_refused_and_moves_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    wrapped = Lookahead(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1))
    model, optimizer = accelerator.prepare(model, wrapped)
    accelerator.backward(model(**global_batch(0)).loss)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(AFLoRAError, match="cannot be tried out"):
        AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, before)
    assert not wrapped.base.state


def test_a_rate_of_zero_hides_nothing() -> None:
    with pytest.raises(AFLoRAError, match="depends on other elements"):
        Loop(optimizer=lambda p: NormScaled(p, lr=torch.tensor(0.0)))  # type: ignore[arg-type]


def test_a_parameter_that_is_not_contiguous_is_refused_when_attached() -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.weight = nn.Parameter(head.weight.detach().T.contiguous().T)
    with pytest.raises(AFLoRAError, match=r"classifier.*weight is not contiguous"):
        AdaptiveFreezing(accelerator, *accelerator.prepare(model, build_optimizer(model, "head")), CONFIG)


def test_what_does_not_train_and_what_is_added_later_stays_in_the_optimizer() -> None:
    loop = Loop()
    kept = len(loop.optimizer.param_groups[0]["params"])
    extra = nn.Parameter(torch.zeros(3))
    loop.optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(3)
    loop.train()
    assert not loop.freezing.remaining
    assert loop.optimizer.param_groups[-1]["params"] == [extra]
    assert len(loop.optimizer.param_groups[0]["params"]) == kept - 8


def test_copies_of_a_prepared_optimizer_are_on_their_own() -> None:
    loop = Loop()
    loop.train(0, 2)
    other = copy.deepcopy(loop.optimizer)
    before = loop.weights()
    for group in other.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    other.step()
    assert loop.freezing.step == 2
    assert_same(loop.weights(), before)
