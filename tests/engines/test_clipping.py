"""Gradients before clipping: what is undone, and what is noticed and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aflora_dist import AFLoRAError
from tests.loop import Loop, assert_same
from tests.workers.tiny import global_batch


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


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_clipping_everything_away_is_refused_and_not_taken_for_divergence(norm: float) -> None:
    loop = Loop()
    with pytest.raises(AFLoRAError, match="leave the call out"):
        loop.step(0, clip=norm)


def test_clipping_a_part_of_an_accumulated_gradient_is_refused() -> None:
    loop = Loop()
    loop.accelerator.gradient_accumulation_steps = 2
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(loop.model(**global_batch(0)).loss)
        with pytest.raises(AFLoRAError, match="sync_gradients"):
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 0.01)
    loop.accelerator.gradient_state._set_sync_gradients(True)  # shared by all accelerators of a process


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_fused_optimizer_under_fp16_freezes_and_learns_what_it_does_without_scaling(clip: float | None) -> None:
    """Scaled by a power of two, and not clipped, even to the bit; Trainer's own optimizer on a GPU is such a one."""
    scaled, plain = (Loop(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True)) for _ in range(2))
    scaled.scale_losses()
    for loop in (scaled, plain):
        for number in range(12):
            loop.step(number, clip)
    assert scaled.freezing.events
    assert [event.frozen for event in scaled.freezing.events] == [event.frozen for event in plain.freezing.events]
    for mine, theirs in zip(scaled.freezing.events, plain.freezing.events, strict=True):
        assert mine.scores == pytest.approx(theirs.scores, rel=1e-6 if clip is None else 1e-3, abs=0)
    assert_same(scaled.weights(), plain.weights())
    inner = scaled.optimizer.optimizer
    assert not inner._step_supports_amp_scaling
    scaled.freezing.detach()
    assert inner._step_supports_amp_scaling  # as it was


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


def test_what_changes_gradients_before_another_backward_pass_is_noticed() -> None:
    loop, other = Loop(), torch.nn.Linear(2, 2)
    loop.train(0, 1)  # before, the gradients of what freezes are zero
    loop.backward(1)
    torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
    with pytest.raises(AFLoRAError, match=r"accelerator\.clip_grad_norm_"):
        loop.accelerator.backward(other(torch.ones(1, 2)).sum())


def test_a_skipped_batch_s_gradients_may_be_zeroed_in_place() -> None:
    ours, other = Loop(), Loop()
    for number in range(12):
        ours.step(number)
        other.backward(number + 50)
        other.model.zero_grad(set_to_none=False)
        other.step(number)
    assert_same(ours.weights(), other.weights())


def test_two_models_are_clipped_each_on_its_own() -> None:
    """As in adversarial training: both backward passes and both clippings before both updates."""
    ours, plain, second = Loop(), Loop(), torch.nn.Linear(2, 2)
    for number in range(12):
        plain.step(number, clip=0.01)
        ours.backward(number)
        ours.accelerator.clip_grad_norm_(ours.model.parameters(), 0.01)
        ours.accelerator.backward(second(torch.ones(1, 2)).sum())
        ours.accelerator.clip_grad_norm_(second.parameters(), 0.01)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
    assert [(e.step, e.frozen, e.scores) for e in ours.freezing.events] == [
        (e.step, e.frozen, e.scores) for e in plain.freezing.events
    ]
    assert_same(ours.weights(), plain.weights())
