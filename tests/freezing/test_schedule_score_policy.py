"""Eq. 2-5 against closed formulas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from aflora_dist import AFLoRAError
from aflora_dist.freezing import CubicSchedule, Fragment, FreezingConfig, FreezingPolicy, FreezingScore
from aflora_dist.freezing.schedule import whole_steps


def test_the_schedule_is_zero_then_cubic_then_one() -> None:
    schedule = CubicSchedule(total_steps=100, initial_steps=10, final_steps=50)
    assert [schedule.fraction(t) for t in (0, 9, 10)] == [0.0, 0.0, 0.0]
    assert schedule.fraction(30) == pytest.approx(1 - 0.5**3)
    assert [schedule.fraction(t) for t in (50, 99)] == [1.0, 1.0]
    assert [schedule.count(t, 24) for t in (10, 30, 49, 50)] == [0, 21, 23, 24]


def test_freezing_may_begin_at_once_and_end_with_the_last_step() -> None:
    assert CubicSchedule(total_steps=4, initial_steps=0, final_steps=0).fraction(3) == pytest.approx(1 - 0.25**3)
    assert CubicSchedule(total_steps=4, initial_steps=2, final_steps=2).count(2, 5) == 5  # no ramp in between


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"initial_steps": -1}, "initial_steps must not be negative"),
        ({"initial_steps": 9}, r"lower initial_steps \(t_i\) or final_steps \(t_f\)"),
        ({"prefix_steps": -7, "prefix": True}, "prefix_steps must not be negative"),
        ({"prefix_steps": 8, "prefix": True}, "prefix_steps=8"),
        ({"prefix_steps": 1}, "is for prefix=True"),
    ],
)
def test_what_steps_cannot_be_is_refused_by_their_names(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(AFLoRAError, match=said):
        FreezingConfig(**{"total_steps": 10, "initial_steps": 3, "final_steps": 2, **wrong})


@pytest.mark.parametrize("total", [7, 100, 103, 1001])
@pytest.mark.parametrize("initial", [0.0, 0.1, 0.25, 0.3, 0.5, 1.0])
def test_shares_of_a_training_that_fit_in_it_still_do_when_rounded(total: int, initial: float) -> None:
    for final in (0.0, 0.1, 0.5, 0.7, 1.0 - initial):
        if initial + final <= 1:
            found = whole_steps(total * initial, total * final, total)
            CubicSchedule(total_steps=total, initial_steps=found[0], final_steps=found[1])
            assert abs(found[0] - total * initial) <= 0.5
            assert abs(found[1] - total * final) <= 1
    too_long = whole_steps(total * initial, total * (1.0 - initial) + 1, total)
    with pytest.raises(AFLoRAError, match="does not fit"):
        CubicSchedule(total_steps=total, initial_steps=too_long[0], final_steps=too_long[1])


def test_the_quadratic_shape_freezes_few_early_and_most_late() -> None:
    schedule = CubicSchedule(total_steps=100, initial_steps=30, final_steps=30, shape="quadratic")
    assert [schedule.fraction(t) for t in (29, 30, 40, 50, 60, 69, 70, 99)] == pytest.approx(
        [0, 0, 1 / 16, 1 / 4, 9 / 16, (39 / 40) ** 2, 1, 1]
    )
    with pytest.raises(AFLoRAError, match=r"one of cubic, quadratic, got 'linear'"):
        CubicSchedule(total_steps=4, initial_steps=0, final_steps=0, shape="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [1, 3, 10, 49, 1000])
def test_grouped_decisions_are_so_far_apart_and_all_is_frozen_in_time(every: int) -> None:
    schedule = CubicSchedule(total_steps=100, initial_steps=10, final_steps=50, every=every)
    plain = CubicSchedule(total_steps=100, initial_steps=10, final_steps=50)
    counts = [schedule.count(t, 24) for t in range(100)]
    changes = [t for t in range(1, 100) if counts[t] != counts[t - 1]]
    assert all(later - earlier >= every for earlier, later in itertools.pairwise(changes))
    assert all(counts[t] == plain.count(t, 24) for t in changes)
    assert counts[49] < 24
    assert counts[50:] == [24] * 50
    assert all(plain.count(max(t - every + 1, 0), 24) <= counts[t] <= plain.count(t, 24) for t in range(100))


@pytest.mark.parametrize(
    ("T", "t_i", "t_f", "every", "said"),
    [
        (10, 5, 6, 1, "t_i \\+ t_f"),
        (0, 0, 0, 1, "total_steps must be at least 1"),
        (5, -1, 2, 1, "initial_steps must not be negative"),
        (5, 1, 2, 0, "every must be at least 1"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(T: int, t_i: int, t_f: int, every: int, said: str) -> None:
    with pytest.raises(AFLoRAError, match=said):
        CubicSchedule(total_steps=T, initial_steps=t_i, final_steps=t_f, every=every)


@pytest.mark.parametrize("kind", ["gradient", "sensitivity", "relative"])
def test_scores_equal_equations_2_to_4_in_float64(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(20, 30, generator=generator)
    weights = torch.randn(20, 30, generator=generator)
    score = FreezingScore([Fragment("A", 0, 30)], "cpu", kind=kind, beta1=0.85, beta2=0.95)
    smoothed = uncertainty = torch.zeros(30, dtype=torch.float64)
    for g, w in zip(gradients, weights, strict=True):
        score.observe([g * 4], [w], scale=0.25)
        importance = {"gradient": g, "sensitivity": w * g, "relative": g / w}[kind].double().abs()
        smoothed = 0.85 * smoothed + 0.15 * importance
        uncertainty = 0.95 * uncertainty + 0.05 * (importance - smoothed).abs()
    assert score.partial_sums()["A"].item() == pytest.approx((smoothed * uncertainty).sum().item(), rel=1e-5)


def test_a_zero_weight_does_not_break_the_relative_score() -> None:
    score = FreezingScore([Fragment("A", 0, 2)], "cpu", kind="relative")
    score.observe([torch.ones(2)], [torch.tensor([0.0, 1.0])])
    assert torch.isfinite(score.partial_sums()["A"])


def test_observing_does_not_change_the_gradient() -> None:
    gradient = torch.tensor([-1.0, 2.0])
    FreezingScore([Fragment("A", 0, 2)], "cpu").observe([gradient])
    assert gradient.tolist() == [-1.0, 2.0]


def test_the_lowest_scores_join_those_that_are_frozen_and_ties_go_by_name() -> None:
    policy = FreezingPolicy(["x.A", "x.B", "y.A", "y.B"])
    assert policy.next_frozen({"x.A": 2.0, "x.B": 1.0, "y.A": 1.0, "y.B": 3.0}, 2) == ["x.B", "y.A"]
    assert policy.next_frozen({"x.A": 2.0, "y.B": 3.0}, 3) == ["x.A"]
    assert policy.next_frozen({"x.A": 2.0, "y.B": 3.0}, 2) == []


def test_pairs_freeze_together_by_their_mean() -> None:
    policy = FreezingPolicy(["x.A", "x.B", "y.A", "y.B"], unit="layer")
    assert len(policy) == 2
    assert policy.next_frozen({"x.A": 0.0, "x.B": 9.0, "y.A": 3.0, "y.B": 3.0}, 1) == ["y.A", "y.B"]
