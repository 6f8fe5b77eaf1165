"""The page on accuracy is made from the results that are committed beside it."""

from __future__ import annotations

import runpy
from dataclasses import replace

from aflora_dist.study.cells import Compared
from aflora_dist.study.differences import Difference
from aflora_dist.study.results import Results
from tests.launch import ROOT

SCRIPT = ROOT / "docs" / "accuracy.py"


def test_the_page_is_what_the_committed_results_make_of_it() -> None:
    made = runpy.run_path(str(SCRIPT))["page"]()
    assert made == (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8"), "run python docs/accuracy.py"
    assert "{{" not in made


def test_it_answers_in_its_first_ten_lines() -> None:
    first = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").splitlines()[:10]
    said = " ".join(first)
    assert "after correction): " in said, "no difference was measured"
    assert "For whom" in said


def test_who_it_is_for_follows_from_what_is_seen() -> None:
    counted = runpy.run_path(str(SCRIPT))["counted"]
    difference = Difference(1.0, 3, 0.9, 1.1, 0.001, 0.01)
    better = Compared("reviews", "prefix", "lora", "accuracy", difference)
    worse = Compared("reviews", "random", "never", "accuracy", replace(difference, mean=-1.0))
    unseen = Compared("reviews", "gradient", "never", "accuracy", replace(difference, p=0.9, corrected=0.9))
    same = replace(worse, other="shorter", same="random - never")
    assert counted([]) == "not measured yet"
    assert counted([better]) == "better in 1 of 1 (prefix) and worse in 0 of 1 comparisons"
    neither = "better in 0 of 1 and worse in 0 of 1 comparisons, no difference seen in the rest"
    assert counted([unseen]) == neither
    all_of = "better in 1 of 3 (prefix) and worse in 1 of 3 (random) comparisons, no difference seen in the rest"
    assert counted([better, worse, unseen, same]) == all_of
    assert counted([same]) == "better in 0 of 1 and worse in 1 of 1 (random) comparisons"


def test_committed_results_are_of_runs_of_one_process_on_a_cpu() -> None:
    """Seconds are compared among them."""
    records = [r for r in Results(ROOT / "docs" / "results").records.values() if "failed" not in r]
    assert records
    assert {(r["engine"], r["world_size"]) for r in records} == {("single", 1)}
    assert all(r["train_cpu_seconds"] for r in records)
