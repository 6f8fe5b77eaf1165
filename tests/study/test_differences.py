"""What is said of differences: against SciPy, and on data that have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from aflora_dist.study.differences import LEVEL, Difference, corrected_for, paired


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_a_paired_difference_is_scipy_s(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    ours, theirs = rng.normal(80, 2, seeds), rng.normal(79, 2, seeds)
    found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs)
    between = expected.confidence_interval(0.95)
    assert found is not None
    assert (found.mean, found.p) == pytest.approx((float(np.mean(ours - theirs)), expected.pvalue))
    assert (found.low, found.high) == pytest.approx((between.low, between.high))


def test_seeds_that_one_of_them_lacks_do_not_count() -> None:
    found = paired({0: 1.0, 1: 2.0, 2: 5.0}, {1: 1.0, 2: 1.0, 7: 100.0})
    assert found is not None
    assert (found.mean, found.seeds) == (2.5, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_and_equal_differences_claim_nothing() -> None:
    for ours in ({0: 2.0}, {0: 2.0, 1: 3.0}):
        found = paired(ours, {0: 1.0, 1: 2.0})
        assert found is not None
        assert found.p is None
        assert not corrected_for([found])[0].seen


def test_what_is_left_of_rounding_is_no_scatter() -> None:
    """One answer of 277 more each time, as results keep accuracies: six digits of them, in points."""
    ours, theirs = ({i: 100 * float(f"{n / 277:.6g}") for i, n in enumerate(of)} for of in ((200, 211), (199, 210)))
    found = paired(ours | {2: 100 * float(f"{190 / 277:.6g}")}, theirs | {2: 100 * float(f"{189 / 277:.6g}")})
    assert found is not None
    assert (found.p, found.low, found.high) == (None, None, None)
    assert not corrected_for([found])[0].seen


def test_the_correction_is_holm_s() -> None:
    """As in Holm (1979): the smallest p times all, the next times one less, none smaller than one before it."""
    ps = [0.01, 0.04, 0.03, 0.005, None]
    found = corrected_for([Difference(1.0, 5, p=p) for p in ps])
    assert [one.corrected for one in found] == [pytest.approx(p) if p else None for p in (0.03, 0.06, 0.06, 0.02, None)]


def test_a_table_without_a_difference_claims_one_at_most_so_often() -> None:
    """Six methods, five seeds that move all of them, each compared with the first, as in a table of controls."""
    rng, tables, claims = np.random.default_rng(0), 2000, 0
    for _ in range(tables):
        values = rng.normal(0, 1, (6, 5)) + rng.normal(0, 3, 5)
        methods = [dict(enumerate(row.tolist())) for row in values]
        found = [one for method in methods[1:] if (one := paired(method, methods[0])) is not None]
        claims += any(one.seen for one in corrected_for(found))
    error = math.sqrt(LEVEL * (1 - LEVEL) / tables)
    assert 0 < claims / tables < LEVEL + 2 * error


def test_a_difference_that_is_there_is_seen() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(80, 1, 5)
    found = paired(dict(enumerate((first + 3 + rng.normal(0, 0.5, 5)).tolist())), dict(enumerate(first.tolist())))
    assert found is not None
    assert corrected_for([found])[0].seen
