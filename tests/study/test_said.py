"""What a study's file says is what its runs get; what its runs came to is what is kept of them, and no more."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.study import work
from aflora_dist.study.cells import cells, compared
from aflora_dist.study.command import main
from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Grid
from aflora_dist.study.results import Results, name_of
from aflora_dist.study.tables import as_csv, latex, markdown
from tests.study.test_leaving import starts, work_on
from tests.study.written import grid_of, keep, settle, write_study

SWEEP = {"seeds": [9], "options": {"data.hold_out": 100}}
RATE = "train.learning_rate"


def study_of(folder: Path, text: str, **more: Any) -> Any:
    (folder / "mine.yaml").write_text(text)
    return read_study(folder / "mine.yaml", **more)


def test_names_are_what_is_written(tmp_path: Path) -> None:
    """In YAML 1.1 on, yes and True are one key, as 1, 1.0 and 0x1 are; here they are names of four methods."""
    study = study_of(
        tmp_path,
        "tasks: {no: {preset: demo}, 1.0: {preset: demo}, 1: {preset: demo}}\nseeds: [0]\n"
        "methods: {on: {adapter.r: 1}, yes: {adapter.r: 2}, off: {rates_of: on}, 'True': {adapter.r: 4}}\n"
        "compare: [[on, off]]\n",
    )
    assert [*study.tasks] == ["no", "1.0", "1"]
    assert [*study.methods] == ["on", "yes", "off", "True"]
    assert study.methods["off"].rates_of == "on"
    assert study.compare == [("on", "off")]


@pytest.mark.parametrize(
    ("said", "got"), [("no", "no"), ("yes", "yes"), ("1.10", None), ("2026", None), ("true", None), ("'1.10'", "1.10")]
)
def test_texts_stay_as_they_are_written_or_are_refused(said: str, got: str | None, tmp_path: Path) -> None:
    text = f"tasks: {{t: {{preset: demo}}}}\nmethods: {{a: {{model.revision: {said}}}}}\nseeds: [0]\n"
    study = study_of(tmp_path, text)
    if got is None:
        with pytest.raises(AFLoRAError, match=r"model\.revision must be text \(put numbers, and true and false, into"):
            Grid(study)
    else:
        (run,) = Grid(study).plan({}).runs()
        assert run.config.model.revision == got


@pytest.mark.parametrize(
    ("methods", "options", "where"),
    [
        ({"a": {RATE: 0.1, "sweep": {RATE: [0.1, 1.0]}}}, {}, "among its own options"),
        ({"b": {"sweep": {RATE: [0.1, 1.0]}}, "a": {RATE: 0.1, "rates_of": "b"}}, {}, "among its own options"),
        ({"a": {"sweep": {RATE: [0.1, 1.0]}}}, {RATE: 0.2}, "among the options of the sweep"),
    ],
)
def test_what_is_searched_is_not_given_as_well(methods: Any, options: Any, where: str, tmp_path: Path) -> None:
    sweep = {"seeds": [9], "options": {"data.hold_out": 100, **options}}
    with pytest.raises(AFLoRAError, match=rf"{RATE} is searched for a, and {where}, too\. Drop one"):
        grid_of(tmp_path, methods=methods, sweep=sweep)


@pytest.mark.parametrize(
    "options", [{"run": {"overwrite": True}}, {"config": "mine.yaml"}, {"train": {"seed": 3}}, {"metric": "f1"}]
)
def test_whole_groups_are_no_way_around_what_is_the_study_s_to_say(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError, match=r"settings(: '\w+' is no option| has a metric)"):
        read_study(write_study(tmp_path, methods={"a": {}}, settings=options))


def test_small_replaces_settings_and_adds_to_methods(tmp_path: Path) -> None:
    small = {"settings": {"method.options": {"r": 4}, "data.mix": None}, "methods": {"a": {"adapter.r": 2}}}
    ours = {"train.head_learning_rate": None, "method.options": {"r": 8, "lora_alpha": 8}, "data.mix": {"x": 1}}
    file = write_study(tmp_path, methods={"a": {"adapter.alpha": 3}}, settings=ours, small=small)
    study = read_study(file, small=True)
    assert study.settings == {"train.head_learning_rate": None, "method.options": {"r": 4}, "data.mix": None}
    assert study.methods["a"].options == {"adapter.alpha": 3, "adapter.r": 2}


def test_options_for_all_runs_stand_in_the_table_and_in_its_name(tmp_path: Path) -> None:
    file = write_study(tmp_path, methods={"a": {}})
    grid = Grid(read_study(file), {"train.epochs": "7", "train.eval_batch_size": "8", "run.verbose": "true"})
    assert grid.study.label == "mine_train.epochs=7"
    assert "All runs with train.epochs 7." in markdown(grid, {})
    assert Grid(read_study(file)).study.label == "mine"


def test_a_method_of_the_settings_is_asked_whether_it_freezes(tmp_path: Path) -> None:
    settings = {"method.name": "lora", "freezing.initial_epochs": 0.2}
    grid = grid_of(tmp_path, methods={"plain": {}, "freezing": {"freezing.enabled": True}}, settings=settings)
    of = {run.method: run.config.freezing.initial_epochs for run in grid.plan({}).runs()}
    assert of["freezing"] == 0.2
    assert of["plain"] != 0.2


def test_results_are_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {}}, seeds=[0]), Results(tmp_path / "results")
    before = os.umask(0o027)
    try:
        settle(grid, results, lambda run: 0.7)
    finally:
        os.umask(before)
    (file,) = (tmp_path / "results").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"settings": {"train.epochs": 3}},
        {"engine": ["x"]},
        {"world_size": None},
        {"peak_memory_bytes": "much"},
        {"train_cpu_seconds": "1"},
        {"avg_trainable_params": None},
        {"evaluations": ["x"]},
        {"version": {}},
        {"ended": "0001-01-01T00:00+00:00"},
        {"frozen": {"A": "late"}},
    ],
)
def test_what_no_run_has_left_is_told_of(change: dict[str, Any], tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {}}, seeds=[0]), Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.7)
    (file,) = (tmp_path / "results").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AFLoRAError, match=rf"{file.name} is no run's result, or damaged"):
        Results(tmp_path / "results")


def test_a_count_keeps_all_its_digits(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"a": {}}, seeds=[0]), Results(tmp_path / "results")
    keep(results, grid.plan({}).runs()[0], 0.7, avg_trainable_params=1327104.0, train_seconds=12.3456789)
    assert "| 1,327,104 | 12.3 |" in markdown(grid, results.records)


def leaves(folder: Path, hours: float = 0.0) -> None:
    """What a run leaves behind, so many hours ago."""
    metrics = {"accuracy": 0.5}
    record = {"task": "demo", "metrics": metrics, "evaluations": [metrics], "train_seconds": 1.0}
    (folder / "config.yaml").write_text("model: {name: demo}\ndata: {task: demo}\ntrain: {seed: 0}\n")
    (folder / "result.json").write_text(json.dumps(record))
    then = (datetime.now(UTC) - timedelta(hours=hours)).timestamp()
    os.utime(folder / "result.json", (then, then))


def test_a_result_that_is_found_keeps_when_its_run_ended(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, methods={"a": {}}, seeds=[0])
    (run,) = grid.plan({}).runs()
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    leaves(folder, hours=70)
    assert work_on(grid, tmp_path).run()
    ended = datetime.fromisoformat(Results(tmp_path / "results").records[run.name]["ended"])
    assert timedelta(hours=69) < datetime.now(UTC) - ended < timedelta(hours=71)


def test_data_with_a_number_that_is_not_finite_is_no_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts(lambda n: (2, "aflora: error: m.jsonl, line 4: a number in it is not finite.\n"), monkeypatch)
    with pytest.raises(AFLoRAError, match=r"ended with status 2: m\.jsonl, line 4: a number in it is not finite"):
        work_on(grid_of(tmp_path, methods={"a": {}}, seeds=[0]), tmp_path).run()


def test_what_a_run_said_is_told_and_not_what_its_launcher_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "aflora: error: The model 'x' could not be loaded.\nsubprocess.CalledProcessError: Command '[...]'\n"
    starts(lambda n: (1, said), monkeypatch)
    with pytest.raises(AFLoRAError, match=r"ended with status 1: The model 'x' could not be loaded\. All that"):
        work_on(grid_of(tmp_path, methods={"a": {}}, seeds=[0]), tmp_path).run()


@pytest.mark.parametrize("begins", [False, True])
def test_a_value_that_nobody_listed_and_nothing_takes_is_none(
    begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep goes beyond 0.5, to 2.5, at which PEFT refuses a dropout; where such a run has begun, it is told."""
    dropout = "method.options.lora_dropout"
    methods = {"a": {"method.name": "lora", "sweep": {dropout: [0.1, 0.5]}}}
    grid, results = grid_of(tmp_path, methods=methods, sweep=SWEEP, seeds=[0]), Results(tmp_path / "results")
    for run in grid.plan(results.records).runs():
        keep(results, run, run.options[dropout])
    (tried,) = [run for run in grid.plan(results.records).runs() if run.name not in results.records]
    assert tried.options[dropout] == 2.5
    folder = tmp_path / "runs" / tried.name

    def behaves(number: int) -> tuple[int, str]:
        if not number:
            if begins:
                (folder / "metrics.jsonl").write_text("{}\n")
            return 2, "aflora: error: dropout probability has to be between 0 and 1, but got 2.5\n"
        (last,) = [run for run in grid.plan(results.records).runs() if run.name not in results.records]
        leaves(tmp_path / "runs" / last.name)
        return 0, ""

    starts(behaves, monkeypatch)
    if begins:
        with pytest.raises(AFLoRAError, match="dropout probability"):
            work.Work(grid, results, tmp_path / "runs").run()
        return
    assert work.Work(grid, results, tmp_path / "runs").run()
    assert grid.plan(results.records).chosen["reviews", "a"] == {dropout: 0.5}


def test_data_that_change_under_a_run_are_not_what_it_is_named_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\ngood,1\nbad,0\n")
    files = {
        "data.task": "files",
        "model.name": "demo",
        "data.train_file": str(data),
        "data.validation_file": str(data),
    }
    grid = grid_of(tmp_path, tasks={"t": {**files, "metric": "accuracy"}}, methods={"a": {}}, seeds=[0])
    (run,) = grid.plan({}).runs()
    folder = tmp_path / "runs" / run.name

    def behaves(number: int) -> tuple[int, str]:
        if not number:
            data.write_text("text,label\ngood,1\n")
        leaves(folder)
        return 0, ""

    started = starts(behaves, monkeypatch)
    with pytest.raises(AFLoRAError, match=r"its data were changed while it ran, so it is not kept; what it left is in"):
        work_on(grid, tmp_path).run()
    assert not [*(tmp_path / "results").glob("*")]
    assert (tmp_path / "runs" / f"{run.name}.other-data1" / "result.json").exists()
    grid = Grid(grid.study)
    (other,) = grid.plan({}).runs()
    assert other.name == name_of(other.config) != run.name
    assert len(started) == 1


def test_tables_of_one_seed_and_numbers_of_each(tmp_path: Path) -> None:
    methods = {"a": {"adapter.r": 2}, "[b]": {}}
    grid, results = grid_of(tmp_path, methods=methods, compare=[["[b]", "a"]]), Results(tmp_path / "results")
    settle(grid, results, lambda run: {"accuracy": 0.7, "train_seconds": 10.0 * (1 + run.seed)})
    rows = [row.split(",") for row in as_csv(grid, results.records)[""].splitlines()]
    seconds = rows[0].index("seconds")
    assert [row[seconds] for row in rows[1:4]] == ["10.0", "20.0", "30.0"]
    assert "{}reviews & [b]" in latex(grid, results.records)
    one = Grid(read_study(write_study(tmp_path, methods=methods, compare=[["[b]", "a"]], seeds=[0])))
    (pair,) = compared(one, cells(one, results.records))
    assert pair.said == "one seed: no p"


def test_a_name_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("reproduce", ["--tasks", "rte", "table2", "--dry_run"]) == 2
    assert "Which study? Its name comes first: aflora reproduce NAME --tasks" in capsys.readouterr().err
