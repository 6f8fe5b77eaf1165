"""The freezing decisions of an independent float64 program (tests/data/freezing.json)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from aflora_dist.freezing import CubicSchedule, Fragment, FreezingPolicy, FreezingScore
from tests.conftest import SHARED

GOLDEN = Path(__file__).parents[1] / "data" / "freezing.json"


def gradient(case: dict[str, Any], k: int, step: int) -> torch.Tensor:
    rows, columns = case["shapes"][k]
    i = torch.arange(rows, dtype=torch.float64).unsqueeze(1)
    j = torch.arange(columns, dtype=torch.float64)
    wave = torch.sin(0.7 * i + 1.3 * j + case["frequency"][k] * step + case["phase"][k])
    return case["amplitude"][k] * wave * (1 + 0.5 * math.cos(0.31 * step * (k + 1)))


def run(case: dict[str, Any], ranks: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]], dict[str, float]]:
    """Eq. 2-5 with every matrix cut over `ranks` make-believe ranks."""
    names, numel = case["names"], {n: r * c for n, (r, c) in zip(case["names"], case["shapes"], strict=True)}
    schedule = CubicSchedule(
        total_steps=case["total_steps"], initial_steps=case["initial_steps"], final_steps=case["final_steps"]
    )
    policy = FreezingPolicy(names)
    remaining = list(names)

    def build() -> list[FreezingScore]:
        scores = []
        for rank in range(ranks):
            fragments = []
            for name in remaining:
                share = -(-numel[name] // ranks)
                fragments.append(Fragment(name, rank * share, min(share, numel[name] - rank * share)))
            scores.append(FreezingScore(fragments, "cpu", beta1=case["beta1"], beta2=case["beta2"]))
        return scores

    scores, log, recorded, ratios = build(), [], {}, {}
    for step in range(case["total_steps"]):
        for score in scores:
            flat = {n: gradient(case, names.index(n), step).flatten() for n in remaining}
            score.observe([flat[f.name][f.start : f.start + f.numel] for f in score.fragments])
        values = {n: sum(s.partial_sums()[n].item() for s in scores) / numel[n] for n in remaining}
        if step in case["record_scores_at"]:
            recorded[str(step)], ratios[str(step)] = values, schedule.fraction(step)
        frozen = policy.next_frozen(values, schedule.count(step, len(policy)))
        if frozen:
            log.append({"step": step, "frozen": sorted(frozen)})
            remaining = [n for n in remaining if n not in frozen]
            old, scores = scores, build()
            for before, after in zip(old, scores, strict=True):
                kept = dict(before.spans())
                for fragment, at in after.spans():
                    for kind in ("smoothed", "uncertainty"):
                        source = getattr(before, kind)[kept[fragment] :][: fragment.numel]
                        getattr(after, kind)[at : at + fragment.numel] = source
        if not remaining:
            break
    return log, recorded, ratios


@pytest.mark.parametrize("ranks", [1, 3])
def test_decisions_scores_and_schedule_equal_the_golden_file(ranks: int) -> None:
    golden = json.loads(GOLDEN.read_text())
    log, scores, ratios = run(golden["case"], ranks)
    expected = golden["expected"]
    assert log == [{"step": e["step"], "frozen": sorted(e["frozen"])} for e in expected["freeze_log"]]
    for step, values in expected["scores"].items():
        assert scores[step] == pytest.approx(values, rel=1e-5, abs=0)
    assert ratios == pytest.approx(expected["ratio"], rel=1e-12)


def test_our_copy_is_the_golden_file() -> None:
    if not (SHARED / "golden").is_dir():
        pytest.skip("no golden file beside the checkout")
    assert json.loads(GOLDEN.read_text()) == json.loads((SHARED / "golden" / "freezing.json").read_text())
