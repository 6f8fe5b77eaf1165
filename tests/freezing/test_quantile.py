"""The rule of the authors' scripts, against their arithmetic written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aflora_dist.errors import AFLoRAError
from aflora_dist.freezing import Fragment, FreezingConfig, FreezingScore
from aflora_dist.freezing.policy import QuantilePolicy
from aflora_dist.freezing.quantile import quantile

NAMES = [f"layer{i}.{matrix}" for i in range(4) for matrix in "AB"]
SIZES = dict(zip(NAMES, (40, 24, 64, 16, 40, 24, 64, 16), strict=True))
CONFIG = FreezingConfig(total_steps=60, initial_steps=7, final_steps=20, every=5, rule="quantile")


def gradients(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    scale = dict(zip(NAMES, (1, 2, 0.5, 1.5, 3, 0.8, 1.2, 0.9), strict=True))
    return {name: generator.standard_normal(SIZES[name]).astype(np.float32) * scale[name] for name in NAMES}


def scripts() -> list[tuple[int, set[str]]]:
    """What freezes when: one process, whole matrices, their order of things."""
    window, smoothed, uncertainty = ({n: np.zeros(SIZES[n], np.float32) for n in NAMES} for _ in range(3))
    T, t_i, t_f = CONFIG.total_steps, CONFIG.initial_steps, CONFIG.final_steps
    remaining, log = list(NAMES), []
    for step in range(T):
        local = step % 5
        for name in remaining:
            g = np.abs(gradients(step)[name])
            if local == 0:
                smoothed[name] = 0.85 * smoothed[name] + 0.15 * window[name]
                uncertainty[name] = 0.95 * uncertainty[name] + 0.05 * np.abs(window[name] - smoothed[name])
                window[name] = g
            else:
                window[name] = (window[name] * local + g) / (local + 1)
        if step <= t_i:
            continue
        left = 0.0 if step > T - t_f else (1 - (step - t_i) / (T - t_f - t_i)) ** 3
        if remaining and (step % 5 == 0 or step > T - t_f):
            elements = np.sort(np.concatenate([smoothed[n] * uncertainty[n] for n in remaining]))
            threshold = elements[int(len(elements) * (1 - left)) - 1]
            frozen = {n for n in remaining if (smoothed[n] * uncertainty[n]).mean() < threshold}
            remaining = [n for n in remaining if n not in frozen]
            if frozen:
                log.append((step, frozen))
    return log


def test_it_freezes_what_the_scripts_freeze() -> None:
    policy, schedule = QuantilePolicy(NAMES), CONFIG.schedule()
    remaining, log = list(NAMES), []
    score = FreezingScore([Fragment(n, 0, SIZES[n]) for n in NAMES], "cpu", window=CONFIG.window)
    for step in range(CONFIG.total_steps):
        score.observe([torch.from_numpy(gradients(step)[n]) for n in NAMES], step=step)
        if not policy.due(schedule, step, len(remaining)):
            continue
        pieces = {f.name: slice(at, at + f.numel) for f, at in score.spans() if f.name in remaining}
        products = score.smoothed * score.uncertainty
        scores = {n: products[piece].double().mean().item() for n, piece in pieces.items()}
        names = policy.choose(
            schedule,
            step,
            scores,
            lambda q, p=products, at=pieces: quantile([p[i] for i in at.values()], q, lambda v: v),
        )
        assert names == sorted(names, key=scores.__getitem__)
        remaining = [n for n in remaining if n not in names]
        if names:
            log.append((step, set(names)))
    assert log == scripts()
    assert len(log) >= 3
    assert not remaining
    assert not policy.due(schedule, CONFIG.total_steps - 1, 0)


@pytest.mark.parametrize("fraction", [0.0, 0.004, 0.31, 0.5, 0.999, 1.0])
def test_the_quantile_is_the_element_that_sorting_finds(fraction: float) -> None:
    values = torch.rand(1001, generator=torch.Generator().manual_seed(0)) ** 8  # many magnitudes
    values[::7] = 0.0
    values[5] = 1e-41  # subnormal
    k = int(fraction * 1001)
    expected = values.sort().values[k - 1].item() if k else float("-inf")
    assert quantile([values[:3], values[3:3], values[3:].reshape(2, -1)], fraction, lambda v: v) == expected


def test_pairs_are_refused() -> None:
    with pytest.raises(AFLoRAError, match="drop pairwise"):
        FreezingConfig(total_steps=9, initial_steps=1, final_steps=1, rule="quantile", pairwise=True)
    with pytest.raises(AFLoRAError, match="rule must be one of rank, quantile"):
        FreezingConfig(total_steps=9, initial_steps=1, final_steps=1, rule="median")  # type: ignore[arg-type]
