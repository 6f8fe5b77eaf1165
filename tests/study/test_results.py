"""By what runs are told apart, and what of a result is read again."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.options import Config, DataConfig, RunConfig
from aflora_dist.store.rundir import refuse_own_input
from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Grid
from aflora_dist.study.results import Results, name_of, result_in
from tests.study.written import grid_of, keep, write_study

FOUND = {"metrics": {"accuracy": 0.5}, "evaluations": [{"accuracy": 0.5}], "train_seconds": 1 / 3}


def name(**data: Any) -> str:
    return name_of(Config(data=DataConfig(**data)))


def folder_of(path: Path, *files: str, text: str = "a\tb\n") -> str:
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(text)
    return str(path)


def test_a_folder_of_glue_s_files_is_the_content_of_those_that_the_task_reads(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", "CoLA/train.tsv", "CoLA/dev.tsv", "RTE/train.tsv")
    moved = folder_of(tmp_path / "moved", "CoLA/train.tsv", "CoLA/dev.tsv")
    other = folder_of(tmp_path / "other", "CoLA/train.tsv", "CoLA/dev.tsv", text="c\td\n")
    assert name(task="cola", path=one) == name(task="cola", path=moved) != name(task="cola", path=other)
    assert name(task="cola", path=one) != name(task="cola")
    with pytest.raises(AFLoRAError, match=r"data\.path=.*RTE/dev\.tsv could not be read"):
        name(task="rte", path=one)


@pytest.mark.parametrize("part", ["", ":main:train"])
def test_a_folder_that_lies_as_a_data_set_is_its_content(part: str, tmp_path: Path) -> None:
    def both(folder: str) -> tuple[str, str]:
        mix = name(task="files", train_file=f"{folder}/train.csv", mix={f"{folder}{part}": 2.0})
        return name(task="files", name=folder), mix

    one, moved = (folder_of(tmp_path / f, "train.csv", ".git/HEAD", "part/more.csv") for f in ("one", "moved"))
    before = both(one)
    assert before == both(moved)
    (tmp_path / "one" / ".git" / "HEAD").write_text("elsewhere")
    assert both(one) == before
    (tmp_path / "one" / "part" / "more.csv").write_text("other,rows")
    assert all(new != old for new, old in zip(both(one), before, strict=True))


def test_a_data_set_of_the_hub_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of results that are there; what is made up is, whatever lies beside it."""
    monkeypatch.chdir(tmp_path)
    before = name(task="sft", name="demo"), name(task="files", name="nyu-mll/glue", subset="rte")
    folder_of(tmp_path / "demo", "train.csv")
    assert (name(task="sft", name="demo"), name(task="files", name="nyu-mll/glue", subset="rte")) == before
    assert before[1] == "files-aflora-8b8104c5e6-seed0"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"methods": {"a": {"train.gradient_checkpointing": True}, "b": {"train.gradient_checkpointing": False}}},
            "mine: a on reviews and b on reviews differ only in train.gradient_checkpointing",
        ),
        (
            {"methods": {"a": {"sweep": {"train.accumulation": [1, 2]}}}},
            "a on reviews and a on reviews differ only in train.accumulation",
        ),
        (
            {
                "methods": {"a": {}},
                "tasks": {t: {"preset": "demo", "train.eval_batch_size": n} for t, n in (("x", 4), ("y", 8))},
            },
            "a on x and a on y differ only in train.eval_batch_size",
        ),
    ],
)
def test_what_differs_only_in_what_makes_no_other_run_is_refused(
    said: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    sweep = {"seeds": [9], "options": {"data.hold_out": 16}}
    with pytest.raises(AFLoRAError, match=expected):
        grid_of(tmp_path, sweep=sweep, **said)


def test_two_folders_of_one_task_are_two_runs_unless_they_hold_the_same(tmp_path: Path) -> None:
    def grid(*texts: str) -> Grid:
        tasks = {}
        for number, text in enumerate(texts):
            path = folder_of(tmp_path / str(number), "CoLA/train.tsv", "CoLA/dev.tsv", text=text)
            tasks[f"cola {number}"] = {"preset": "glue/cola", "data.path": path}
        return Grid(read_study(write_study(tmp_path, tasks=tasks, methods={"a": {}}, seeds=[0])))

    assert len(grid("one", "other").plan({}).runs()) == 2
    with pytest.raises(AFLoRAError, match=r"a on cola 0 and a on cola 1 differ only in data\.path"):
        grid("same", "same")


@pytest.mark.parametrize(
    ("option", "value"),
    [("train.learning_rate", 0.0012345678), ("train.max_grad_norm", 123456.78), ("data.mix", {"nyu-mll/multi": 1 / 3})],
)
def test_what_is_kept_is_read_again_however_many_digits_an_option_has_and_whatever_the_clock_says(
    option: str, value: Any, tmp_path: Path
) -> None:
    data = {"data.task": "files", "data.train_file": folder_of(tmp_path, "a.csv") + "/a.csv", "model.name": "demo"}
    grid = grid_of(tmp_path, tasks={"mine": data}, methods={"a": {option: value}}, seeds=[0])
    (run,) = grid.plan({}).runs()
    results = Results(tmp_path / "results")
    results.keep(run.name, run.config, FOUND, None, datetime.fromtimestamp(0, UTC))
    again = Results(tmp_path / "results").records
    assert again == results.records
    assert grid.plan(again).runs()[0].name in again


def test_a_home_folder_s_sign_names_what_it_names_where_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = f"{folder_of(tmp_path, 'data/train.csv')}/data/train.csv"
    assert name(task="files", train_file="~/data/train.csv") == name(task="files", train_file=file)
    mixed = [name(task="files", train_file=file, mix={f"{at}/data:main": 1.0}) for at in ("~", tmp_path)]
    assert mixed[0] == mixed[1]
    (tmp_path / "data").rename(tmp_path / "adapter")
    data = DataConfig(task="files", train_file="~/adapter/train.csv")
    with pytest.raises(AFLoRAError, match=r"would delete ~/adapter/train\.csv, which this run reads"):
        refuse_own_input(Config(data=data, run=RunConfig(dir=str(tmp_path), overwrite=True)))


@pytest.mark.parametrize("lost", ["metrics", "evaluations", "train_seconds", "settings"])
def test_a_result_without_what_tables_ask_for_is_damaged(lost: str, tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {}}, seeds=[0]), Results(tmp_path / "results")
    (run,) = grid.plan({}).runs()
    keep(results, run, 0.8)
    file = tmp_path / "results" / f"{run.name}.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != lost}))
    with pytest.raises(AFLoRAError, match=rf"{run.name}\.json is no run's result, or damaged. Delete it"):
        Results(tmp_path / "results")


@pytest.mark.parametrize("text", ['{"metrics": {"accu', "[]", '{"task": "demo"}'])
def test_a_cut_result_of_a_run_is_said_with_what_to_do(text: str, tmp_path: Path) -> None:
    assert result_in(tmp_path) is None
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(AFLoRAError, match=r"result\.json cannot be read: .*\. If it is cut, delete it"):
        result_in(tmp_path)
