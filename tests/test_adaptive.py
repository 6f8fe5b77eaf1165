"""AdaptiveFreezing in a user's loop: what it needs, what it refuses, and skipped updates."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezeEvent, FreezingCallback, FreezingConfig
from tests.launch import ROOT, launch
from tests.workers.tiny import build_model, build_optimizer, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)


class Loop:
    """A user's loop in one process."""

    def __init__(self, config: FreezingConfig = CONFIG, **adapter: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        model = build_model(**adapter)
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, "head"))
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config)

    def step(self, number: int, clip: float | None = None) -> None:
        self.accelerator.backward(self.model(**global_batch(number)).loss)
        if clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


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


def test_torch_s_own_clipping_is_noticed() -> None:
    loop = Loop()
    loop.accelerator.backward(loop.model(**global_batch(0)).loss)
    torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.01)
    with pytest.raises(AFLoRAError, match=r"accelerator\.clip_grad_norm_"):
        loop.optimizer.step()


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


def test_a_skipped_update_advances_nothing() -> None:
    """fp16's loss scaling: the scaler skips an update whose gradients overflow."""
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop.accelerator.scaler = loop.optimizer.scaler = scaler
    loop.optimizer._accelerate_step_called = False
    from accelerate.optimizer import patch_optimizer_step

    inner = loop.optimizer.optimizer
    loop.optimizer._optimizer_original_step_method = inner.step
    loop.optimizer._optimizer_patched_step_method = patch_optimizer_step(loop.optimizer, inner.step)
    loop.accelerator.unscale_gradients = lambda: scaler.unscale_(inner)  # as accelerate does under fp16
    plain = Loop()
    for number in range(6):
        plain.step(number, clip=0.05)
        loop.step(number, clip=0.05)
        if number == 3:  # once more, with an overflow
            before = (loop.freezing.step, loop.freezing.scores())
            loop.accelerator.backward(loop.model(**global_batch(number)).loss)
            loop.freezing.engine.parameters[loop.freezing.remaining[0]].grad.fill_(float("inf"))
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.05)
            loop.optimizer.step()
            assert loop.optimizer.step_was_skipped
            assert (loop.freezing.step, loop.freezing.scores()) == before
            loop.optimizer.zero_grad()
    first, second = plain.freezing.events[0], loop.freezing.events[0]
    assert (second.step, second.frozen) == (first.step, first.frozen)
    assert second.scores == pytest.approx(first.scores, rel=1e-3, abs=0)  # unscaled and unclipped


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_fp16_scores_are_unscaled_and_an_overflow_advances_nothing(engine: str) -> None:
    done = launch(engine, 2, str(ROOT / "tests" / "workers" / "overflow.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert found["steps"] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11]
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


def test_sgd_with_momentum_freezes_too() -> None:
    accelerator = Accelerator(cpu=True)
    model = build_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    for number in range(12):
        accelerator.backward(model(**global_batch(number)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert not freezing.remaining
    assert freezing.events[-1].optimizer_state_bytes == 4 * freezing.trainable_params


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
