"""A table compares what can be compared: the same data, each run once, no survivors, and says where it cannot."""

from __future__ import annotations

import json
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from aflora_dist.errors import AFLoRAError
from aflora_dist.options import Config, ModelConfig
from aflora_dist.study import work
from aflora_dist.study.cells import cells, compared
from aflora_dist.study.command import _options, write_tables
from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Grid
from aflora_dist.study.results import Results, name_of
from aflora_dist.study.tables import caption, markdown
from tests.study.written import grid_of, keep, settle, write_study

LORA = {"method.name": "lora"}
SEARCHED = {"sweep": {"train.learning_rate": [1e-3, 1e-2]}}


@pytest.mark.parametrize(
    ("settings", "more"), [({"freezing.enabled": True}, {}), ({}, {"freezing.enabled": "True"})], ids=["file", "line"]
)
def test_freezing_that_is_asked_of_all_methods_is_all_methods(
    settings: dict[str, Any], more: dict[str, str], tmp_path: Path
) -> None:
    settings |= {"freezing.granularity": "matrix"}
    file = write_study(tmp_path, methods={"lora": LORA, "full": {"method.name": "full"}}, settings=settings)
    for runs in Grid(read_study(file), more).plan({}).reported.values():
        assert [(run.config.freezing.enabled, run.config.freezing.granularity) for run in runs.values()] == [
            (True, "matrix")
        ] * 3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"methods": {"a": {}, "b": {"data.hold_out": 100}}},
            "on reviews, b is measured with data.hold_out=100, and a with 0",
        ),
        ({"methods": {"a": {}, "b": {"data.max_eval_examples": 9}}}, "data.max_eval_examples=9, and a with None"),
        (
            {"methods": {"a": SEARCHED}, "sweep": {"seeds": [9], "options": {"data.hold_out": "0"}}},
            "the sweep would choose by what is reported",
        ),
        ({"methods": {"a": {"train.seed": 5}, "b": {}}}, "methods.a: train.seed is the study's to say"),
        ({"methods": {"a": {}}, "settings": {"run.dry_run": True}}, "settings: run.dry_run is the study's to say"),
        ({"methods": {"a": {}}, "tasks": {"x": {"run.overwrite": True}}}, "tasks.x: run.overwrite is the study's"),
        ({"methods": {"a": {}}, "settings": {"metric": "f1"}}, "settings has a metric, which each task has of its own"),
        ({"methods": {"a\nb": {}}}, "methods has the name 'a\\nb'"),
        (
            {"methods": {"a": {"model.attn_implementation": "theirs/attention"}}},
            "methods.a: only the command line can have code of others run",
        ),
    ],
)
def test_what_makes_a_table_wrong_is_refused(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError) as error:
        grid_of(tmp_path, **said)
    assert expected in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.yaml")
    with pytest.raises(AFLoRAError, match=r"is a pipe. Name a file"):
        read_study(tmp_path / "mine.yaml")


@pytest.mark.parametrize("option", ["--preset", "--run.dry_run", "--train.seed"])
def test_what_is_the_study_s_is_not_said_on_the_command_line(option: str) -> None:
    with pytest.raises(AFLoRAError, match=r"A preset is what a task is|is the study's to say"):
        _options([option, "glue/rte"])


def test_another_model_in_the_same_folder_is_another_run(tmp_path: Path) -> None:
    def name(folder: Path, said: str, value: float) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(said)
        save_file({"w": torch.full((4,), value)}, folder / "model.safetensors")
        return name_of(Config(model=ModelConfig(name=str(folder))))

    first = name(tmp_path / "model", "{}", 0.0)
    assert name(tmp_path / "moved", "{}", 0.0) == first
    assert name(tmp_path / "model", "{}", 1.0) != first
    assert name(tmp_path / "model", '{"hidden_act": "relu"}', 0.0) != first


def test_methods_that_came_to_the_same_runs_are_compared_once(tmp_path: Path) -> None:
    never = {"adapter.freezing": "never"}
    methods = {"gradient": {}, "never": never, "shorter": {**never, "seconds_of": "gradient"}}
    compare = [["gradient", "never"], ["gradient", "shorter"], ["shorter", "never"]]
    turned = [["gradient", "never"], ["shorter", "gradient"]]
    grid, results = grid_of(tmp_path, methods=methods, compare=compare), Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.7 + run.seed / 100 + 0.1 * (run.method == "gradient") * (1 + run.seed / 50))
    found = cells(grid, results.records)
    pairs = compared(grid, found)
    alone = grid_of(tmp_path, methods={"gradient": {}, "never": never}, compare=compare[:1])
    (once,) = compared(alone, cells(alone, results.records))
    assert [pair.difference.corrected for pair in pairs] == [once.difference.p, once.difference.p, None]
    said = [pair.said for pair in pairs]
    assert said == ["gradient is better", "gradient is better (the runs of gradient - never)", "the same runs"]
    other = grid_of(tmp_path, methods=methods, compare=turned)
    first, second = compared(other, cells(other, results.records))
    assert first.difference.corrected == second.difference.corrected == once.difference.p
    assert (second.difference.mean, second.said) == (-first.difference.mean, f"gradient is better ({SAME})")
    notes = " ".join(caption(grid, found, pairs))
    assert "shorter came to the very runs of never" in notes
    assert "Holm's method for 1 comparison;" in notes


def test_the_seeds_that_went_well_are_no_verdict(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, methods={"a": {}, "b": {"freezing.score": "random"}}, compare=[["a", "b"]])
    results = Results(tmp_path / "results")
    for runs in grid.plan({}).reported.values():
        for seed, run in runs.items():
            if run.method == "a" and seed == 2:
                results.keep(run.name, run.config, {"failed": "The loss of step 3 is nan."}, 1.0)
            else:
                keep(results, run, 0.7 + seed / 1000 + 0.2 * (run.method == "a") * (1 + seed / 900))
    (pair,) = compared(grid, cells(grid, results.records))
    assert pair.difference.p is not None
    assert pair.difference.p < 0.05
    assert (pair.seen, pair.said) == (False, "no verdict: 1 diverged")
    assert "Where runs diverged, the seeds that are left are those that went well" in markdown(grid, results.records)


def test_what_is_the_same_on_each_seed_has_no_interval(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, methods={"a": {}, "b": {"freezing.score": "random"}}, compare=[["a", "b"]])
    results = Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.9 if run.method == "a" else 0.7)
    text = markdown(grid, results.records)
    assert "| reviews | a - b | 3 | +20.00 | - | - | the same on each seed: no p |" in text
    assert "for 0 comparisons" in text


@pytest.mark.parametrize("change", [{"ended": "yesterday"}, {"ended": "2026-11-30T01:00"}, {"seconds": "long"}])
def test_a_result_that_was_edited_is_told_of(change: dict[str, Any], tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {}}), Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.7)
    (file, *_) = (tmp_path / "results").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AFLoRAError, match=rf"{file.name} is no run's result, or damaged"):
        Results(tmp_path / "results")


def test_a_file_where_results_are_to_go_is_told_of_at_once(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(AFLoRAError, match=r"is a file. Name a folder with --results"):
        Results(tmp_path / "results")


def _keep_often(folder: Path, times: int) -> None:
    results = Results(folder)
    for _ in range(times):
        results.keep(name_of(Config()), Config(), {"failed": "tried"}, 1.0)


def test_two_who_share_results_do_not_take_each_other_s_files(tmp_path: Path) -> None:
    both = [get_context("spawn").Process(target=_keep_often, args=(tmp_path, 100)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == [f"{name_of(Config())}.json"]


def test_memory_that_runs_have_still_to_take_is_not_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {}}), Results(tmp_path / "results")
    settle(grid, results, lambda run: {"accuracy": 0.7, "peak_memory_bytes": 5 << 30, "world_size": 2} | CPU)
    monkeypatch.setattr(work, "start_process", lambda *given: Sleeping())
    memory = type("Memory", (), {"available": 25 << 30})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    study = work.Work(Grid(grid.study, {"train.epochs": "2"}), results, tmp_path / "runs", at_once=8)
    for run in study.grid.plan({}).runs():
        if len(study.jobs) < study._room():
            assert study._begin(run)
    assert len(study.jobs) == 2  # 10 GiB each
    for job in study.jobs.values():
        job.claim.close()


SAME = "the runs of gradient - never"
ENDS = (".md", ".tex", ".csv", "_differences.csv", "_seconds.png")
CPU = {"train_cpu_seconds": 1.0, "train_seconds": 1.0}


class Sleeping:
    """A run that has begun and taken nothing yet."""

    pid = 2**22 + 1  # beyond those that there are

    def poll(self) -> int | None:
        return None


def test_tables_of_a_part_do_not_replace_the_whole_one_s(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, methods={"a": {}, "b": {"freezing.score": "random"}}, compare=[["a", "b"]])
    results = Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.7 + run.seed / 100 * (1 + (run.method == "a")))
    whole = write_tables(grid, results, tmp_path / "tables")
    before = {path: path.read_bytes() for path in whole}
    part = write_tables(Grid(grid.study.restricted([], ["a"], [])), results, tmp_path / "tables")
    assert {path.name for path in part} == {f"mine_a{end}" for end in ENDS}
    assert {path: path.read_bytes() for path in whole} == before
    less = grid_of(tmp_path, methods={"a": {}, "b": {"freezing.score": "random"}})
    assert tmp_path / "tables" / "mine_differences.png" in whole
    write_tables(less, results, tmp_path / "tables")
    assert not (tmp_path / "tables" / "mine_differences.png").exists()
