"""AdaptiveFreezing in a user's loop: what it needs, what it refuses, skipped updates, accelerate's checkpoints."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import patch_optimizer_step
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezeEvent, FreezingCallback, FreezingConfig
from aflora_dist.engines import create_engine
from tests.launch import ROOT, launch
from tests.workers.tiny import build_model, build_optimizer, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)


Create = Callable[[list[nn.Parameter]], Any]


class Loop:
    """A user's loop in one process."""

    def __init__(self, config: FreezingConfig = CONFIG, optimizer: Create | None = None, **adapter: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = build_model(**adapter)
        created = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer else None
        self.model, self.optimizer = self.accelerator.prepare(model, created or build_optimizer(model, "head"))
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config)

    def backward(self, number: int, factor: float = 1.0) -> None:
        self.accelerator.backward(self.model(**global_batch(number)).loss * factor)

    def step(self, number: int, clip: float | None = None, factor: float = 1.0) -> None:
        self.backward(number, factor)
        if clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, start: int = 0, stop: int = 12) -> None:
        for number in range(start, stop):
            self.step(number)

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if "aflora" in n or "classifier" in n}

    def scale_losses(self) -> None:
        """As accelerate does under fp16, which it has for GPUs only."""
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.accelerator.scaler = self.optimizer.scaler = scaler
        self.optimizer._accelerate_step_called = False
        inner = self.optimizer.optimizer
        self.optimizer._optimizer_original_step_method = inner.step
        self.optimizer._optimizer_patched_step_method = patch_optimizer_step(self.optimizer, inner.step)
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(inner)
        self.freezing.release()
        config = self.freezing.config
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config)


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_a_model_that_nothing_freezes_refuses_its_second_step() -> None:
    model = build_model().train()
    model(**global_batch(0)).loss.backward()
    with pytest.raises(RuntimeError, match="AdaptiveFreezing"):
        model(**global_batch(1))
    model.eval()
    model(**global_batch(1))  # evaluation is nobody's business
    never = build_model(freezing="never").train()
    for step in range(3):
        never(**global_batch(step))


def test_events_reach_the_user_and_end_with_the_vectors_and_the_head() -> None:
    loop = Loop()
    seen: list[FreezeEvent] = []
    loop.freezing.on_freeze = seen.append
    for number in range(12):
        loop.step(number)
    assert seen == loop.freezing.events
    assert [e.remaining for e in seen][-1] == 0
    assert loop.freezing.step == 12
    assert all(loop.freezing.engine.parameters[name].grad is None for name in loop.freezing.frozen)
    trained = {n for n, p in loop.model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == {"s_d", "s_b", "weight", "bias"}
    assert all("classifier" in n for n in trained if n.endswith(("weight", "bias")))


@pytest.mark.parametrize("backward", ["accelerator", "plain"])
@pytest.mark.parametrize("scaled", [False, True])
def test_torch_s_own_clipping_is_noticed(backward: str, scaled: bool) -> None:
    loop = Loop()
    if scaled:
        loop.scale_losses()
    loss = loop.model(**global_batch(0)).loss
    if backward == "plain":
        (loop.accelerator.scaler.scale(loss) if scaled else loss).backward()
    else:
        loop.accelerator.backward(loss)
    torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.01)
    with pytest.raises(AFLoRAError, match=r"accelerator\.clip_grad_norm_"):
        loop.optimizer.step()


def test_a_plain_backward_without_clipping_is_as_good() -> None:
    ours, plain = Loop(), Loop()
    for number in range(12):
        ours.step(number)
        plain.model(**global_batch(number)).loss.backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert [(e.step, e.frozen, e.scores) for e in plain.freezing.events] == [
        (e.step, e.frozen, e.scores) for e in ours.freezing.events
    ]
    assert_same(plain.weights(), ours.weights())


def test_clipping_by_value_or_in_parts_is_refused() -> None:
    loop = Loop()
    loop.accelerator.backward(loop.model(**global_batch(0)).loss)
    with pytest.raises(AFLoRAError, match="clip_grad_norm_"):
        loop.accelerator.clip_grad_value_(loop.model.parameters(), 0.1)
    some = [loop.freezing.engine.parameters[n] for n in loop.freezing.freezable[:2]]
    loop.accelerator.clip_grad_norm_(some, 0.01)
    with pytest.raises(AFLoRAError, match="once per update"):
        loop.optimizer.step()


def test_clipping_a_part_of_an_accumulated_gradient_is_refused() -> None:
    loop = Loop()
    loop.accelerator.gradient_accumulation_steps = 2
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(loop.model(**global_batch(0)).loss)
        with pytest.raises(AFLoRAError, match="sync_gradients"):
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.01)
    loop.accelerator.gradient_state._set_sync_gradients(True)  # shared by all accelerators of a process


def test_a_fused_optimizer_under_fp16_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(AFLoRAError, match="fused=False"):
        AdaptiveFreezing(accelerator, model, optimizer, CONFIG)


def test_freezing_by_hand_takes_whole_pairs_and_known_names() -> None:
    loop = Loop(FreezingConfig(total_steps=12, initial_steps=2, final_steps=3, pairwise=True))
    loop.step(0)
    first = loop.freezing.remaining[0]
    loop.freezing.freeze([first])
    assert set(loop.freezing.frozen) == {first, first[:-1] + "B"}
    assert loop.freezing.events[0].frozen == [first, first[:-1] + "B"]
    with pytest.raises(AFLoRAError, match="still trains"):
        loop.freezing.freeze([first])
    for number in range(1, 12):
        loop.step(number)
    assert not loop.freezing.remaining


def test_a_model_is_frozen_by_one_object_at_a_time() -> None:
    loop = Loop()
    with pytest.raises(AFLoRAError, match=r"detach\(\)"):
        AdaptiveFreezing(loop.accelerator, loop.model, loop.optimizer, CONFIG)
    loop.freezing.detach()
    AdaptiveFreezing(loop.accelerator, loop.model, loop.optimizer, CONFIG)


def test_after_detaching_the_rest_trains_to_the_end() -> None:
    loop = Loop()
    loop.train(0, 5)
    remaining, frozen = loop.freezing.remaining, set(loop.freezing.frozen)
    assert remaining
    assert frozen
    before = loop.weights()
    loop.freezing.detach()
    loop.train(5, 12)
    assert loop.freezing.step == 5
    after = loop.weights()
    assert all(torch.equal(after[name], before[name]) == (name in frozen) for name in (*remaining, *frozen))


def test_clipping_twice_is_undone_twice() -> None:
    plain, twice = Loop(), Loop()
    for loop in (plain, twice):
        loop.step(0)  # s_b = 0 at first, so that A and B have no gradient yet
        loop.accelerator.backward(loop.model(**global_batch(1)).loss)
        if loop is twice:
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.05)
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.01)
        loop.optimizer.step()
    expected, found = (loop.freezing.scores() for loop in (plain, twice))
    assert min(expected.values()) > 0
    assert found == pytest.approx(expected, rel=1e-4, abs=0)


def test_a_skipped_update_moves_the_clock_and_nothing_else() -> None:
    """fp16's loss scaling: the scaler skips an update whose gradients overflow."""
    loop, plain = Loop(), Loop()
    loop.scale_losses()
    skipped = (1, 5)
    for number in range(12):
        before = loop.weights(), loop.freezing.remaining
        loop.step(number, clip=0.05, factor=float("inf") if number in skipped else 1.0)
        assert loop.optimizer.step_was_skipped == (number in skipped)
        assert loop.freezing.step == number + 1
        frozen = 8 - len(loop.freezing.remaining)
        assert frozen == loop.freezing.schedule.count(number, 8)  # r(t), whatever was skipped
        if number in skipped:
            assert_same(loop.weights(), before[0])
        elif number == 0 or number == 2:
            plain.step(number, clip=0.05)
        if number == 2:  # unscaled and unclipped, and untouched by the update that was skipped
            scores, expected = loop.freezing.scores(), plain.freezing.scores()
            assert scores == pytest.approx(expected, rel=1e-3, abs=0)
    assert loop.freezing.progress.skipped == 2
    assert any(event.step == 5 for event in loop.freezing.events)  # also after an update that was skipped


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_fp16_scores_are_unscaled_and_an_overflow_moves_only_the_clock(engine: str) -> None:
    done = launch(engine, 2, str(ROOT / "tests" / "workers" / "overflow.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert found["steps"] == list(range(1, 13))
    assert found["skipped"] == 1
    assert found["frozen_counts"] == [CONFIG.schedule().count(t, 8) for t in range(12)]
    plain = Loop()
    for number in range(4):
        plain.step(number, clip=0.05)
    (expected,) = plain.freezing.events
    assert (found["step"], found["frozen"]) == (expected.step, expected.frozen)
    assert found["scores"] == pytest.approx(expected.scores, rel=0.05, abs=0)


def test_a_nan_gradient_is_an_error_at_the_next_decision() -> None:
    loop = Loop()

    def train() -> None:
        for number in range(12):
            loop.accelerator.backward(loop.model(**global_batch(number)).loss * float("nan"))
            loop.optimizer.step()

    with pytest.raises(AFLoRAError, match="not finite after step"):
        train()


def test_models_and_schedules_that_cannot_freeze_are_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(linear := torch.nn.Linear(2, 2), torch.optim.SGD(linear.parameters(), lr=1))
    with pytest.raises(AFLoRAError, match="needs an AFLoRA model"):
        AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    model = build_model()
    head = torch.optim.SGD([p for n, p in model.named_parameters() if "classifier" in n], lr=1)
    with pytest.raises(AFLoRAError, match="nothing to freeze"):
        AdaptiveFreezing(accelerator, *accelerator.prepare(model, head), CONFIG)
    with pytest.raises(AFLoRAError, match="t_i \\+ t_f"):
        FreezingConfig(total_steps=10, initial_steps=6, final_steps=5)
    with pytest.raises(AFLoRAError, match="score must be one of"):
        FreezingConfig(total_steps=10, initial_steps=0, final_steps=5, score="magic")  # type: ignore[arg-type]
    with pytest.raises(AFLoRAError, match="beta1"):
        FreezingConfig(total_steps=10, initial_steps=0, final_steps=5, beta1=1.0)


@pytest.mark.parametrize("adapter", [{"freezable": "none"}, {"freezing": "never"}, {"freezing": "always"}])
def test_an_adapter_that_does_not_freeze_is_left_as_it_is(adapter: dict[str, str]) -> None:
    loop = Loop(**adapter)
    trained = loop.freezing.trainable_params
    for number in range(12):
        loop.step(number)
    assert (loop.freezing.step, loop.freezing.events, loop.freezing.trainable_params) == (12, [], trained)
    loop.accelerator.backward(loop.model(**global_batch(0)).loss)
    loop.accelerator.clip_grad_value_(loop.model.parameters(), 0.1)


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
        assert [(e.step, e.frozen, e.scores) for e in loop.freezing.events] == [
            (e.step, e.frozen, e.scores) for e in whole.freezing.events
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


def test_two_models_do_not_share_what_a_snapshot_holds() -> None:
    first, second = Loop(), Loop()
    first.train(0, 4)
    tensors, record = first.freezing.progress.snapshot()
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    second.freezing.progress.restore(tensors, record)
    first.train(4, 8)
    assert_same(tensors, kept)
    second.train(4, 8)
    assert_same(tensors, kept)
    assert_same(first.weights(), second.weights())


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


def test_fsdp1_is_refused_by_name() -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(AFLoRAError, match=r"FSDP1 \(FullyShardedDataParallel\).*fsdp_version: 2"):
        create_engine(accelerator, nn.Linear(2, 2), None)


def test_scores_need_no_float64_on_a_device_that_has_none() -> None:
    class Mps:
        """A tensor on such a device."""

        device = torch.device("mps")

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def cpu(self) -> torch.Tensor:
            return self.tensor

        def double(self) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    loop = Loop()
    loop.train(0, 3)
    expected = loop.freezing.scores()
    for score in loop.freezing._scores:
        score.smoothed, score.uncertainty = Mps(score.smoothed), Mps(score.uncertainty)  # type: ignore[assignment]
    assert loop.freezing.scores() == expected


def test_ranks_whose_decisions_agree_in_20_bits_only_are_told_apart() -> None:
    def bits(text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[:5], 16)

    seen: dict[int, str] = {}
    number = 0
    while (text := f"0['{number}']") and bits(text) not in seen:
        seen[bits(text)] = text
        number += 1
    mine, theirs = text, seen[bits(text)]
    loop = Loop()
    vectors: list[torch.Tensor] = []
    loop.freezing.engine.max_over_ranks = lambda v: vectors.append(v.clone()) or v  # type: ignore[method-assign,func-returns-value]
    loop.freezing._agree(theirs, "")
    loop.freezing.engine.max_over_ranks = lambda v: torch.maximum(v, vectors[0])  # type: ignore[method-assign]
    loop.freezing._agree(theirs, "")
    with pytest.raises(AFLoRAError, match="The ranks disagree"):
        loop.freezing._agree(mine, "disagree")


def test_a_training_shorter_than_its_schedule_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def said(loop: Loop) -> str:
        capsys.readouterr()
        loop.accelerator.end_training()
        return capsys.readouterr().err

    short, whole, stopped, forgotten = Loop(), Loop(), Loop(), Loop()
    short.train(0, 4)
    assert "ended after 4 of the 12 global batches" in said(short)
    assert said(short) == ""  # once
    whole.train()
    assert said(whole) == ""
    stopped.train(0, 4)
    stopped.freezing.interrupted()
    assert said(stopped) == ""
    forgotten.train(0, 5)
    del forgotten
    gc.collect()
    assert "ended after 5 of the 12" in capsys.readouterr().err


# -- loops and optimizers as people write them -----------------------------------------------------


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
        patch.setattr("tests.test_control.build_model", build)
        whole, cut, again = loop(), loop(), loop()
    whole.train()
    cut.train(0, 6)
    again.freezing.progress.restore(*cut.freezing.progress.snapshot())
    again.train(6, 12)
    assert_same(again.weights(), whole.weights())


def test_a_scheduler_made_after_attaching_sees_every_step() -> None:
    plain, loop = Loop(), Loop()
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda t: 1.0)
    for number in range(12):
        plain.step(number)
        loop.step(number)
        scheduler.step()
    assert loop.freezing.step == 12
    assert_same(loop.weights(), plain.weights())


def test_a_batch_that_is_skipped_after_clipping_leaves_no_trace() -> None:
    plain, skipping = Loop(), Loop()
    for number in range(4):
        plain.step(number, clip=0.05)
        skipping.backward(number, factor=1e4)
        skipping.accelerator.clip_grad_norm_(skipping.model.parameters(), 0.05)
        skipping.optimizer.zero_grad()  # its norm was too large, say
        skipping.backward(number, factor=1e4)
        skipping.accelerator.clip_grad_norm_(skipping.model.parameters(), 0.05)
        skipping.model.zero_grad()  # the other way
        skipping.step(number, clip=0.05)
    assert skipping.freezing.scores() == plain.freezing.scores()


REFUSED_LOOPS: dict[str, tuple[Callable[[Loop], Any], str]] = {
    "a backward pass after clipping": (
        lambda loop: (
            loop.backward(0),
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.01),
            loop.backward(1),
        ),
        "once per update",
    ),
    "a closure": (lambda loop: loop.optimizer.step(lambda: None), "closure"),
    "the inner optimizer": (lambda loop: (loop.backward(0), loop.optimizer.optimizer.step()), "step the latter"),
    "new gradients in place of the old": (
        lambda loop: (
            loop.backward(0),
            [setattr(p, "grad", p.grad * 0.5) for p in loop.model.parameters() if p.grad is not None],
            loop.optimizer.step(),
        ),
        "changed between the backward pass",
    ),
}


@pytest.mark.parametrize("what", REFUSED_LOOPS)
def test_a_loop_in_which_scores_would_be_wrong_is_refused(what: str) -> None:
    loop = Loop()
    call, said = REFUSED_LOOPS[what]
    with pytest.raises(AFLoRAError, match=said):
        call(loop)


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
    assert pickle.loads(pickle.dumps(loop.optimizer)).param_groups[0]["lr"] == loop.optimizer.param_groups[0]["lr"]


# -- accelerate's own ways ----------------------------------------------------------------------


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("after", [2, 5, 9, 12])
def test_accelerate_s_own_checkpoint_holds_the_freezing(registered: bool, after: int, tmp_path: Path) -> None:
    """Before the first freeze, between two, and after the last."""
    whole, cut, resumed = Loop(), Loop(), Loop()
    whole.train()
    if registered:
        cut.accelerator.register_for_checkpointing(cut.freezing)
        resumed.accelerator.register_for_checkpointing(resumed.freezing)
    cut.train(0, after)
    cut.accelerator.save_state(str(tmp_path / "state"))
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.freezing.step == after
    resumed.train(after, 12)
    assert [(e.step, e.frozen, e.scores) for e in resumed.freezing.events] == [
        (e.step, e.frozen, e.scores) for e in whole.freezing.events
    ]
    assert_same(resumed.weights(), whole.weights())


def test_an_earlier_checkpoint_can_be_loaded_after_further_freezes(tmp_path: Path) -> None:
    whole, loop = Loop(), Loop()
    whole.train()
    loop.train(0, 4)
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.train(4, 12)
    loop.accelerator.load_state(str(tmp_path / "state"))
    assert loop.freezing.step == 4
    loop.train(4, 12)
    assert_same(loop.weights(), whole.weights())


def test_a_checkpoint_without_freezing_or_of_another_schedule_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    loop.accelerator.save_state(str(tmp_path / "state"))
    other = Loop(FreezingConfig(total_steps=12, initial_steps=3, final_steps=3))
    with pytest.raises(AFLoRAError, match="initial_steps is 2 there and 3 here"):
        other.accelerator.load_state(str(tmp_path / "state"))
    (tmp_path / "state" / "aflora_freezing.pt").unlink()
    before = loop.weights()
    with pytest.raises(AFLoRAError, match="saved without AdaptiveFreezing"):
        loop.accelerator.load_state(str(tmp_path / "state"))
    assert_same(loop.weights(), before)


def test_a_second_training_in_one_process_frees_the_first() -> None:
    accelerator = Accelerator(cpu=True)
    gone: list[weakref.ref[Any]] = []
    logs = []
    for steps in (12, 12, 6):  # cross-validation, find_executable_batch_size
        model = build_model()
        model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
        freezing = AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
        for number in range(steps):
            accelerator.backward(model(**global_batch(number)).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        logs.append([(e.step, e.frozen, e.scores) for e in freezing.events])
        gone += [weakref.ref(model), weakref.ref(freezing), weakref.ref(freezing.engine)]
        model, optimizer = accelerator.free_memory(model, optimizer)
        del freezing
        gc.collect()
        assert [reference() for reference in gone] == [None] * len(gone)
    assert logs[0] == logs[1]
    assert logs[2] == logs[0][: len(logs[2])] != []


def test_trainer_freezes_with_the_callback_as_the_loop_does(tmp_path: Any) -> None:
    examples = [{k: v[i] for k, v in global_batch(step).items()} for step in range(4) for i in range(12)]
    settings = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        num_train_epochs=5,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=build_model(), args=settings, train_dataset=examples)
    callback = FreezingCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.freezing is not None
    schedule = callback.freezing.schedule
    assert (schedule.total_steps, schedule.initial_steps, schedule.final_steps) == (20, 2, 14)
    assert callback.freezing.step == 20
    for event in callback.freezing.events:
        assert 8 - event.remaining == schedule.count(event.step, 8)
    with pytest.raises(RuntimeError, match="FreezingCallback"):
        Trainer(model=build_model(), args=settings, train_dataset=examples).train()


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["config", "decision"])
def test_ranks_that_disagree_end_with_an_error_on_every_rank(what: str) -> None:
    done = launch("ddp", 2, str(ROOT / "tests" / "workers" / "disagree.py"), what, timeout=120)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: The ranks" in done.stdout


FAILURES = {
    "on_freeze": ("ddp", ["OSError: [Errno 28] No space left", "AFLoRAError: on_freeze failed on rank 0 after step 3"]),
    "on_main": ("ddp", ["ZeroDivisionError: an oversight", "AFLoRAError: The main process failed: ZeroDivisionError"]),
    "local SGD": ("ddp", ["UnsupportedEngineError: The gradients of this update were not reduced"] * 2),
    "Adagrad": ("zero1", ["UnsupportedEngineError: Freezing does not support DeepSpeed's own Adagrad in place"] * 2),
    "plain backward": ("zero2", ["UnsupportedEngineError: optimizer.step() was called, but DeepSpeed has made no"] * 2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("how", FAILURES)
def test_what_goes_wrong_on_one_rank_ends_all_with_the_reason(how: str) -> None:
    engine, expected = FAILURES[how]
    done = launch(engine, 2, str(ROOT / "tests" / "workers" / "failing.py"), how, timeout=120)
    assert done.returncode != 0
    for rank, said in enumerate(expected):
        assert f"rank {rank}: {said}" in done.stdout, done.stdout + done.stderr[-2000:]
