"""What is tried beyond a sweep's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.study.choice import beyond
from aflora_dist.study.results import Results
from aflora_dist.training.command_line import parse
from tests.study.written import grid_of, settle

SWEEP = {"seeds": [100], "options": {"data.hold_out": 16}}


@pytest.mark.parametrize(
    ("tried", "best", "whole", "further"),
    [
        ([2, 4], 2, True, 1),
        ([1, 2], 1, True, None),  # 0.5
        ([7, 10], 10, True, 14),
        ([100, 200], 200, True, 400),
        ([1000, 1001], 1001, True, 1002),
        ([3, 4], 3, True, 2),
        ([1, 2], 1, False, 0.5),
        ([1, 0.1], 1, False, 10.0),
        (["1e-3", 0.01], "1e-3", False, 1e-4),
        ([1000.0, 1000.1], 1000.1, False, None),  # to three digits it has been tried
        ([0.1, 0.2, 0.3], 0.2, False, None),
    ],
)
def test_one_more_value_is_tried_beyond_the_end(tried: list[Any], best: Any, whole: bool, further: Any) -> None:
    found = beyond(tried, best, whole)
    assert found == (None if further is None else [*tried, further])
    assert found is None or isinstance(found[-1], int) == whole


@pytest.mark.parametrize(
    ("option", "values", "tried"),
    [
        ("adapter.r", [2, 4], {1, 2, 4}),
        ("train.max_steps", [100, 200], {25, 50, 100, 200}),
        ("train.learning_rate", [1, 2], {0.25, 0.5, 1, 2}),
        ("train.max_grad_norm", [1, 0.5], {0.125, 0.25, 0.5, 1}),
    ],
)
def test_what_lies_beyond_can_be_run_as_it_is_named(
    option: str, values: list[Any], tried: set[float], tmp_path: Path
) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {"sweep": {option: values}}}, sweep=SWEEP), Results(tmp_path)
    agenda = settle(grid, results, lambda run: 1 / (1 + float(run.options[option])))
    assert {run.options[option] for run in agenda.searched} == tried
    for run in agenda.runs():
        assert parse(run.line())[0] == run.config


def test_a_part_of_a_whole_number_is_refused_and_not_cut_off(tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError, match=r"adapter\.r must be a whole number, not 2\.5"):
        grid_of(tmp_path, methods={"a": {"sweep": {"adapter.r": [2.5, 4]}}}, sweep=SWEEP)
