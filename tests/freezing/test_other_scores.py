"""Scores and rules beside the paper's, each against a few independent lines."""

from __future__ import annotations

import hashlib

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from aflora_dist.freezing import (
    CubicSchedule,
    Fragment,
    FreezingPolicy,
    FreezingScore,
    MatrixScore,
    PartialImportance,
    fixed_scores,
)
from aflora_dist.freezing.order import unit_of
from aflora_dist.freezing.policy import ThresholdPolicy
from aflora_dist.names import module_of

NAMES = [f"model.layers.{i}.{layer}.weight" for i in (0, 1, 2) for layer in ("attn.q", "mlp.up")]


def test_change_is_the_distance_from_the_last_gradient() -> None:
    gradients = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = FreezingScore([Fragment("w", 0, 7)], "cpu", kind="change")
    smoothed = uncertainty = previous = torch.zeros(7, dtype=torch.float64)
    for t, g in enumerate(gradients):
        score.observe([4 * g.float()], scale=0.25, step=t)
        importance = (g - previous).abs()
        previous = g
        smoothed = 0.85 * smoothed + 0.15 * importance
        uncertainty = 0.95 * uncertainty + 0.05 * (importance - smoothed).abs()
    expected = float((smoothed * uncertainty).sum())
    assert float(score.partial_sums()["w"]) == pytest.approx(expected, rel=1e-5)


def test_random_is_drawn_from_seed_and_name_alone() -> None:
    first = fixed_scores("random", dict.fromkeys(NAMES, 1), seed=3)
    assert first == fixed_scores("random", dict.fromkeys(reversed(NAMES), 2), seed=3)
    assert first != fixed_scores("random", dict.fromkeys(NAMES, 1), seed=4)
    digest = hashlib.sha256(f"3/{NAMES[0]}".encode()).hexdigest()
    assert first[NAMES[0]] == int(digest[:16], 16) / 2**64
    many = fixed_scores("random", {f"w{i}": 1 for i in range(4000)})
    assert sum(many.values()) / 4000 == pytest.approx(0.5, abs=0.02)  # more than four standard errors


def test_front_to_back_and_smallest_first() -> None:
    depth = fixed_scores("front_to_back", dict.fromkeys([*NAMES, "model.embed.weight"], 1))
    assert sorted(depth, key=depth.__getitem__) == ["model.embed.weight", *NAMES]
    assert fixed_scores("smallest_first", {"a": 3, "b": 2}) == {"a": 3.0, "b": 2.0}


def test_units_are_matrices_layers_or_blocks() -> None:
    lora = [f"base_model.model.layers.{i}.q.lora_{m}.default.weight" for i in (0, 1) for m in "AB"]
    aflora = [f"base_model.model.layers.{i}.up.aflora.default.{m}" for i in (0, 1) for m in "AB"]
    dora = ["base_model.model.layers.0.q.lora_magnitude_vector.default.weight"]
    assert len({unit_of(name, "layer") for name in lora + dora}) == 2
    assert len({unit_of(name, "layer") for name in aflora}) == 2
    assert {unit_of(name, "block") for name in lora + aflora} == {"layers.0", "layers.1"}
    assert [unit_of(name, "matrix") for name in NAMES] == NAMES
    assert {unit_of(name, "block") for name in NAMES} == {f"model.layers.{i}" for i in range(3)}
    policy = FreezingPolicy(NAMES, unit="block")
    # Of a block the mean counts: 2, 1.5, 3.
    chosen = policy.next_frozen(dict(zip(NAMES, (0.0, 4.0, 1.0, 2.0, 3.0, 3.0), strict=True)), 2)
    assert chosen == [*NAMES[2:4], *NAMES[:2]]


OF_THE_WHOLE_MODEL = "adaption_prompt_ cartridge_ cpt_ ln_tuning_ multitask_prompt_tuning_ p_tuning_ prefix_tuning_ "
OF_THE_WHOLE_MODEL += "prompt_tuning_ trainable_tokens_ xlora_"


@pytest.mark.parametrize(
    "prefix", sorted({*PEFT_TYPE_TO_PREFIX_MAPPING.values()} - {*OF_THE_WHOLE_MODEL.split(), "aflora", None})
)
def test_whoever_of_peft_adapts_a_layer_has_names_that_tell_the_layer(prefix: str) -> None:
    layer = "base_model.model.layers.0.q"
    assert module_of(f"{layer}.{prefix}A.default.weight") == module_of(f"{layer}.{prefix}A.default") == layer


@pytest.mark.parametrize("kind", ["gradient", "sensitivity", "relative"])
def test_one_number_a_matrix_over_two_ranks_is_equations_2_to_4_of_the_mean(kind: str) -> None:
    """Decisions at unequal distances, a skipped step, a fragment on either rank: the same as step by step."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(20, 10, generator=generator)
    weights = torch.randn(20, 10, generator=generator)
    ranks = [
        [PartialImportance([Fragment("a", 0, 3)], kind=kind)],  # type: ignore[arg-type]
        [PartialImportance([Fragment("a", 3, 1), Fragment("b", 0, 6)], kind=kind)],  # type: ignore[arg-type]
    ]
    scores = [MatrixScore({"a": 4, "b": 6}) for _ in ranks]
    expected = {"a": (0.0, 0.0), "b": (0.0, 0.0)}
    sent: list[torch.Tensor] = []

    def remember(sums: torch.Tensor) -> torch.Tensor:
        """What a rank sends, with nothing added to it."""
        sent.append(sums.clone())
        return sums.zero_()

    def add(sums: torch.Tensor) -> torch.Tensor:
        return sums.copy_(sent[0] + sent[1])

    for t in range(20):
        if t != 7:  # whose update was skipped
            g, w = gradients[t], weights[t]
            ranks[0][0].observe([g[:3] * 8], [w[:3]], 1 / 8, t)
            ranks[1][0].observe([g[3:4] * 8, g[4:] * 8], [w[3:4], w[4:]], 1 / 8, t)
            every = {"gradient": g, "sensitivity": g * w, "relative": g / w}[kind].abs().double()
            for name, mean in (("a", float(every[:4].mean())), ("b", float(every[4:].mean()))):
                smoothed = 0.85 * expected[name][0] + 0.15 * mean
                expected[name] = (smoothed, 0.95 * expected[name][1] + 0.05 * abs(mean - smoothed))
        if t in (0, 4, 8, 19):
            sent.clear()
            for buckets, score in zip(ranks, scores, strict=True):
                twin = MatrixScore(score.numels)
                twin.begun = score.begun
                twin.take(buckets, t + 1, remember)
            for score in scores:
                score.take([], t + 1, add)
    for score in scores:
        assert score.scores() == pytest.approx({n: s * u for n, (s, u) in expected.items()}, rel=1e-5)
    scores[0].keep(["b"])
    assert scores[0].scores() == pytest.approx({"b": expected["b"][0] * expected["b"][1]}, rel=1e-5)


def test_a_unit_freezes_when_it_has_fallen_below_a_fraction_of_its_own_early_level() -> None:
    schedule = CubicSchedule(total_steps=10, initial_steps=3, final_steps=0, every=2)
    policy = ThresholdPolicy(["a", "b"], threshold=0.5)
    assert [t for t in range(3) if policy.due(schedule, t, 2)] == []
    assert policy.due(schedule, 3, 2)
    assert policy.choose(schedule, 3, {"a": 8.0, "b": 0.1}, float) == []  # these are the levels
    assert [t for t in range(4, 10) if policy.due(schedule, t, 2)] == [4, 6, 8]
    assert policy.choose(schedule, 4, {"a": 4.0, "b": 0.06}, float) == []
    again = ThresholdPolicy(["a", "b"], threshold=0.5)
    again.load_state(policy.state())
    for one in (policy, again):
        assert one.choose(schedule, 6, {"a": 3.9, "b": 0.06}, float) == ["a"]
        assert one.choose(schedule, 8, {"b": 0.04}, float) == ["b"]
    assert not policy.due(schedule, 8, 0)


def test_a_score_of_nothing_is_no_level() -> None:
    """With t_i = 0: s_b is 0 before the first update, so that neither A nor B has a gradient."""
    schedule = CubicSchedule(total_steps=10, initial_steps=0, final_steps=0)
    policy = ThresholdPolicy(["a", "b"], threshold=0.5)
    assert policy.choose(schedule, 0, {"a": 0.0, "b": 4.0}, float) == []
    assert policy.choose(schedule, 1, {"a": 2.0, "b": 3.0}, float) == []  # a's is known now
    assert policy.choose(schedule, 2, {"a": 0.9, "b": 3.0}, float) == ["a"]
