"""Which runs a study has, what is chosen for them, and by what; nothing is trained."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.options import Config, DataConfig, RunConfig
from aflora_dist.study.cells import cells, compared
from aflora_dist.study.description import read_study, shipped
from aflora_dist.study.grid import Grid, Planned
from aflora_dist.study.results import Results, name_of, settings_of
from aflora_dist.study.tables import as_csv, latex, markdown
from aflora_dist.study.work import outlook
from aflora_dist.training.command_line import parse
from tests.launch import ROOT
from tests.study.written import grid_of, keep, settle, write_study

SWEEP = {"seeds": [100, 101], "options": {"data.hold_out": 500}}
RATES = {"never": {"adapter.freezing": "never", "sweep": {"train.learning_rate": ["1e-3", 1e-2]}}}


def rate(run: Planned) -> float:
    return run.config.train.learning_rate


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("small", [False, True], ids=["paper's", "small"])
def test_every_shipped_study_is_one(name: str, small: bool) -> None:
    study, data = read_study(shipped()[name], small), {}
    if name == "word_problems":
        with pytest.raises(AFLoRAError, match=r"word_problems, problems: it names no data. Add --data.train_file"):
            Grid(study)
        data = {"data.name": "demo"}
    agenda = Grid(study, data).plan({})
    assert agenda.runs()
    assert len(agenda.runs()) + agenda.open >= len(study.tasks) * len(study.methods)


def test_the_paper_s_setting_is_the_preset(tmp_path: Path) -> None:
    run = Grid(read_study(shipped()["fig5"])).plan({}).reported["rte", "aflora"][3]
    assert settings_of(run.config) == settings_of(parse(["--preset", "glue/rte"])[0])
    assert run.seed == 3


def test_the_best_rate_is_chosen_by_seeds_and_data_that_are_not_reported(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods=RATES, sweep=SWEEP), Results(tmp_path / "results")
    first = grid.plan(results.records)
    assert {(rate(run), run.seed) for run in first.searched} == {(r, s) for r in (1e-3, 1e-2) for s in (100, 101)}
    assert (first.reported, first.open) == ({}, 3)

    def accuracy(run: Planned) -> float:  # best at 0.1, which is not among the values: it lies beyond
        best = 1 - abs(round(10 * (rate(run) - 0.1), 3)) / 100
        return best if run.config.data.hold_out else 0.5

    agenda = settle(grid, results, accuracy)
    assert sorted({rate(run) for run in agenda.searched}) == [1e-3, 1e-2, 0.1, 1.0]
    assert {run.config.data.hold_out for run in agenda.searched} == {500}
    shown = agenda.reported["reviews", "never"]
    assert {(rate(run), run.config.data.hold_out) for run in shown.values()} == {(0.1, 0)}
    assert [*shown] == [0, 1, 2]


def test_a_sweep_comes_on_top_of_what_another_method_s_came_to(tmp_path: Path) -> None:
    methods = {**RATES, "vectors": {"rates_of": "never", "sweep": {"train.vector_learning_rate": [0.1, 0.2, 0.3]}}}
    grid, results = grid_of(tmp_path, methods=methods, sweep=SWEEP), Results(tmp_path / "results")
    agenda = settle(grid, results, lambda run: 0.8 - abs((run.config.train.vector_learning_rate or 0.5) - 0.2))
    vectors = {"train.learning_rate": agenda.chosen["reviews", "never"]["train.learning_rate"]}
    assert agenda.chosen["reviews", "vectors"] == {**vectors, "train.vector_learning_rate": 0.2}


def test_a_rate_that_breaks_down_is_not_chosen(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods=RATES, sweep=SWEEP), Results(tmp_path / "results")
    for run in grid.plan({}).searched:
        if rate(run) == 1e-2 and run.seed == 101:
            results.keep(run.name, run.config, {"failed": "The loss of step 3 is nan."}, 1.0)
        else:
            keep(results, run, 0.9 if rate(run) == 1e-2 else 0.6)
    for run in grid.plan(results.records).searched:
        if run.name not in results.records:
            assert rate(run) == 1e-4  # 1e-3 is best, and lies at the end
            keep(results, run, 0.5)
    assert grid.plan(results.records).chosen["reviews", "never"] == {"train.learning_rate": "1e-3"}


def test_shorter_is_as_much_data_as_the_other_s_seconds_allow(tmp_path: Path) -> None:
    methods = {"gradient": {}, "shorter": {"adapter.freezing": "never", "seconds_of": "gradient"}}
    grid, results = grid_of(tmp_path, methods=methods), Results(tmp_path / "results")

    def took(run: Planned) -> dict[str, Any]:
        seconds = 7.0 if run.config.adapter.freezing == "adaptive" else 10.0
        return {"accuracy": 0.8, "train_cpu_seconds": seconds, "train_seconds": 100.0}

    agenda = settle(grid, results, took)
    examples = {run.config.data.max_train_examples for run in agenda.reported["reviews", "shorter"].values()}
    assert examples == {int(0.7 * 4992) // 64 * 64}


def test_a_changed_setting_is_another_run_and_where_data_lie_is_not(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, methods={"aflora": {}})
    name = grid.plan({}).runs()[0].name
    moved = Grid(grid.study, {"run.log_every": "1", "train.eval_batch_size": "7", "data.tokens_per_micro_batch": "99"})
    assert moved.plan({}).runs()[0].name == name
    for other in ({"train.epochs": "2"}, {"model.name": "roberta-base"}, {"freezing.score": "random"}):
        assert Grid(grid.study, other).plan({}).runs()[0].name != name
    seeds = [run.name for run in grid.plan({}).runs()]
    assert len({*seeds}) == 3
    assert {one.rpartition("-seed")[0] for one in seeds} == {name.rpartition("-seed")[0]}


def test_a_file_is_its_content_and_a_data_set_its_name(tmp_path: Path) -> None:
    def name(**data: Any) -> str:
        return name_of(Config(data=DataConfig(task="files", **data), run=RunConfig(trackers=[])))

    for folder, text in (("one", "text,label"), ("moved", "text,label"), ("other", "text,label\nlong,1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_text(text)
    one, moved, other = (str(tmp_path / folder / "train.csv") for folder in ("one", "moved", "other"))
    for option in ("train_file", "validation_file"):
        assert name(**{option: one}) == name(**{option: moved}) != name(**{option: other})
    mixed = [name(train_file=one, mix={file: 2.0}) for file in (one, moved, other)]
    assert mixed[0] == mixed[1] != mixed[2]
    assert name(name="nyu-mll/reviews") != name(name="others/reviews")
    Path(one).write_text("text,label\nshort,0")
    assert name(train_file=one) != name(train_file=moved)
    with pytest.raises(AFLoRAError, match=r"data.train_file=.*gone.csv could not be read: No such file"):
        name(train_file=str(tmp_path / "gone.csv"))


@pytest.mark.parametrize("run", [{"eval_every": 5}, {"keep_best": "accuracy"}, {"keep_best": "f1", "patience": 2}])
def test_what_decides_how_long_a_run_trains_and_what_it_keeps_is_part_of_it(run: dict[str, Any]) -> None:
    assert name_of(Config(run=RunConfig(**run))) != name_of(Config())
    assert name_of(Config(run=RunConfig(log_every=1, save_every=0, keep=9))) == name_of(Config())


def test_committed_results_are_found_by_their_names() -> None:
    """All of them stand in a table; a setting's name must not change."""
    page = runpy.run_path(str(ROOT / "docs" / "accuracy.py"))
    known, problems = page["committed"]().records, page["PROBLEMS"]
    files = {"data.train_file": problems.train_file, "data.validation_file": problems.validation_file}
    studies = [read_study(file, small=True) for file in shipped().values()]
    tasks = [[t for t in study.tasks if "reviews" in t or t in ("stsb", "problems")] for study in studies]
    parts = [study.restricted(of, [], []) for study, of in zip(studies, tasks, strict=True)]
    grids = [Grid(study, files if "problems" in study.tasks else {}) for study in parts]
    planned = {run.name for grid in grids for run in grid.plan(known).runs()}
    # Data of GLUE and the word problems lay somewhere: what a page asks for without them stands for them.
    elsewhere = {name for name, record in known.items() if {"data.path", *files} & {*record["settings"]}}
    assert {*known} - elsewhere <= planned
    assert len(elsewhere & planned) * 2 == len(elsewhere)


def test_equal_runs_of_two_methods_are_one(tmp_path: Path) -> None:
    same = {"one": {"adapter.freezing": "never"}, "other": {"adapter.freezing": "never"}}
    assert len(grid_of(tmp_path, methods=same).plan({}).runs()) == 3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"method": {}}, "Did you mean methods?"),
        ({"methods": {"a": {"rates": 1}}}, "methods.a: there is no 'rates'. Did you mean rates_of?"),
        ({"methods": {"a": {"rates_of": "b"}}}, "refers to 'b', which is no method of it"),
        ({"methods": {"a": {"rates_of": "b"}, "b": {"rates_of": "a"}}}, "which takes from others itself"),
        ({"methods": RATES}, "no section `sweep` says by which seeds"),
        ({"methods": RATES, "sweep": {**SWEEP, "seeds": [2]}}, "seed 2 is the sweep's and is reported, too"),
        ({"methods": RATES, "sweep": {"seeds": [9]}}, "the sweep would choose by what is reported"),
        ({"methods": {"a": {}}, "compare": [["a", "b"]]}, "compare names 'b'"),
        ({"methods": {}}, "names no methods"),
        ({"compare": ["a", "b"]}, "compare must list pairs of methods, as [[plain, other]]; 'a' is none"),
        ({"compare": 3}, "compare must hold a list"),
        ({"seeds": 3}, "seeds must hold a list"),
        ({"seeds": [0, "x"]}, "seeds must list whole numbers from 0 on"),
        ({"sweep": {"options": {"data.hold_out": 5}}}, "sweep.seeds must list whole numbers"),
        ({"sweep": {**SWEEP, "wider": "far"}}, "sweep.wider is how many values"),
        ({"paper": {"a": {"reviews": "best"}}}, "paper.a.reviews must be a number"),
        ({"pictures": ["map"]}, "there is no picture 'map'"),
        ({"methods": {a: {"rates_of": b} for a, b in ("ab", "bc", "ca")}}, "which takes from others itself"),
        ({"methods": {"a": {"sweep": {"train.epochs": [1, "all"]}}}, "sweep": SWEEP}, "'all' is among a sweep's"),
        ({"tasks": {"reviews": {"preset": "demo", "metric": "f1"}}}, "reviews has no metric 'f1': it has accuracy."),
        ({"sweep": {**SWEEP, "metric": "loss"}}, "reviews has no metric 'loss': it has accuracy."),
        ({"methods": RATES, "sweep": SWEEP, "settings": {"data.hold_out": 9}}, "what rates are chosen by"),
        (
            {"methods": RATES, "sweep": SWEEP, "tasks": {"reviews": {"preset": "demo", "data.hold_out": 9}}},
            "data.hold_out is the sweep's to say",
        ),
        ({"methods": {"a": {"train.rate": 1}}}, "mine, a on reviews: There is no option --train.rate"),
        ({"methods": {"a": {"train.epochs": "many"}}}, "train.epochs must be a whole number"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_before_it_runs(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError) as error:
        Grid(read_study(write_study(tmp_path, **{"methods": {"a": {}}, **said}))).plan({})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"data.hold_out": "0"}, "the sweep would choose by what is reported"),
        ({"data.hold_out": "100"}, "data.hold_out is the sweep's to say"),
        ({"train.learning_rate": "0.1"}, "train.learning_rate is searched for never, and given for all runs"),
    ],
)
def test_a_command_line_does_not_decide_what_a_sweep_is_for(
    more: dict[str, str], expected: str, tmp_path: Path
) -> None:
    study = read_study(write_study(tmp_path, methods={**RATES, "other": {"rates_of": "never"}}, sweep=SWEEP))
    with pytest.raises(AFLoRAError) as error:
        Grid(study, more)
    assert expected in str(error.value)
    Grid(read_study(write_study(tmp_path, methods={"a": {}}, sweep=SWEEP)), more)  # which searches nothing


def test_shorter_is_a_share_of_what_a_command_line_says(tmp_path: Path) -> None:
    methods = {"gradient": {}, "shorter": {"adapter.freezing": "never", "seconds_of": "gradient"}}
    study, results = read_study(write_study(tmp_path, methods=methods)), Results(tmp_path / "results")

    def took(run: Planned) -> dict[str, Any]:
        seconds = 7.0 if run.config.adapter.freezing == "adaptive" else 10.0
        return {"accuracy": 0.8, "train_cpu_seconds": seconds, "train_examples": 1000}

    agenda = settle(Grid(study, {"data.max_train_examples": "1000"}), results, took)
    examples = {key: {run.config.data.max_train_examples for run in of.values()} for key, of in agenda.reported.items()}
    assert examples == {("reviews", "gradient"): {1000}, ("reviews", "shorter"): {640}}


def test_a_sweep_without_a_good_run_breaks_its_methods_and_no_other(tmp_path: Path) -> None:
    methods = {**RATES, "also": {"rates_of": "never"}, "plain": {"freezing.score": "random"}}
    grid = grid_of(tmp_path, methods=methods, sweep=SWEEP, compare=[["plain", "never"]])
    results = Results(tmp_path / "results")
    for run in grid.plan({}).runs():
        if run.config.data.hold_out:
            results.keep(run.name, run.config, {"failed": "The loss of step 3 is nan."}, 1.0)
    agenda = settle(grid, results, lambda run: 0.8)
    assert {*agenda.broken} == {("reviews", "never"), ("reviews", "also")}
    assert [*agenda.reported] == [("reviews", "plain")]
    text = markdown(grid, results.records)
    assert "| reviews | never | 0 (broken, see below) | accuracy | - |" in text
    assert "never on reviews: no value of the sweep over train.learning_rate ended well." in text
    assert "| reviews | plain | 3 | accuracy | 80.00" in text


def test_a_sweep_is_widened_as_far_as_the_option_takes_it(tmp_path: Path) -> None:
    """warmup_ratio 0.4, 0.8, and 1.6, which is none."""
    methods = {"warm": {"sweep": {"train.warmup_ratio": [0.2, 0.4, 0.8]}}}
    grid, results = grid_of(tmp_path, methods=methods, sweep=SWEEP), Results(tmp_path / "results")
    agenda = settle(grid, results, lambda run: run.config.train.warmup_ratio / 10)
    assert agenda.chosen["reviews", "warm"] == {"train.warmup_ratio": 0.8}


def test_a_run_without_the_metric_has_not_diverged(tmp_path: Path) -> None:
    """A file of your own has an F1 where it has two classes: data tell."""
    (tmp_path / "train.csv").write_text("text,label")
    task = {"data.task": "files", "data.train_file": str(tmp_path / "train.csv"), "metric": "f1"}
    task["model.name"] = "demo"
    grid, results = grid_of(tmp_path, tasks={"mine": task}, methods={"a": {}}), Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.8)
    (cell,) = cells(grid, results.records)
    assert (cell.failed, cell.missing, cell.broken) == (0, 0, "a on mine: there is no metric 'f1', but accuracy.")
    assert "0 (broken, see below)" in markdown(grid, results.records)


def test_a_damaged_result_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "demo-aflora-0123456789-seed0.json").write_text('{"settings": {')
    with pytest.raises(AFLoRAError, match="or damaged"):
        Results(tmp_path)


def test_tables_say_what_the_results_say(tmp_path: Path) -> None:
    """Against numbers worked out by hand: accuracies 0.80, 0.82, 0.84 and 0.79, 0.80, 0.83."""
    methods = {"never": {"adapter.freezing": "never"}, "random": {"freezing.score": "random"}}
    paper = {"never": {"reviews": 79.5}, "quoted_method": {"reviews": 80.5}}
    grid = grid_of(tmp_path, methods=methods, compare=[["never", "random"]], paper=paper, differs="a test.")
    results = Results(tmp_path / "results")
    values = {"never": [0.80, 0.82, 0.84], "adaptive": [0.79, 0.80, 0.83]}
    settle(grid, results, lambda run: values[run.config.adapter.freezing][run.seed])
    found = cells(grid, results.records)
    assert [cell.mean for cell in found[:2]] == pytest.approx([82.0, 80.6667], abs=1e-3)
    (pair,) = compared(grid, found)
    assert pair.difference.mean == pytest.approx(4 / 3)
    assert pair.said == "no difference seen"
    text = markdown(grid, results.records)
    assert "| reviews | never | 3 | accuracy | 82.00 ± 2.00 | 82.00 | 100 | 10.0 | 79.50 |" in text
    assert "| reviews | quoted_method | 0 (quoted) | accuracy | - | - | - | - | 80.50 |" in text
    assert "| reviews | never - random | 3 | +1.33 | -0.10 to +2.77 | 0.057 | no difference seen |" in text
    assert text.rstrip().endswith("Setting: a test.")
    assert r"quoted\_method" in latex(grid, results.records)
    assert r"82.00 $\pm$ 2.00" in latex(grid, results.records)
    numbers = as_csv(grid, results.records)
    assert "reviews,never,accuracy,1,82.0," in numbers[""]
    assert numbers["differences"].count("\n") == 2


def test_a_table_says_whose_seconds_were_not_measured_at_the_same_time(tmp_path: Path) -> None:
    methods = {"never": {"adapter.freezing": "never"}, "random": {"freezing.score": "random"}}
    grid, results = grid_of(tmp_path, methods=methods), Results(tmp_path / "results")
    runs = settle(grid, results, lambda run: 0.8).reported
    assert "at the same time" not in markdown(grid, results.records)  # they have just been
    for method, ends in {"never": ("10:00", "10:50", "11:49"), "random": ("10:10", "12:50", "13:10")}.items():
        for run, end in zip(runs["reviews", method].values(), ends, strict=True):
            results.records[run.name]["ended"] = f"2026-05-01T{end}+00:00"
    text = markdown(grid, results.records)  # each took 12 s: from 11:49 to 12:49 nothing ran
    assert (
        "(never from 01 May 2026 09:59 on; random from 01 May 2026 09:59 and 01 May 2026 12:49 on; UTC): seconds of "
        "different times do not compare"
    ) in text


def test_an_outlook_counts_what_is_left_and_how_long_it_takes(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"aflora": {}}), Results(tmp_path / "results")
    assert outlook(grid.plan({}), results).startswith("3 of 3 runs to do, how long is known")
    keep(results, grid.plan({}).runs()[0], 0.8)  # took 12 s
    assert outlook(grid.plan(results.records), results) == "2 of 3 runs to do, about 24 s one after the other."
    settle(grid, results, lambda run: 0.8)
    assert outlook(grid.plan(results.records), results) == "all 3 runs are done."


def test_a_result_holds_what_a_study_needs_and_no_more(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods={"aflora": {}}), Results(tmp_path / "results")
    keep(results, grid.plan({}).runs()[0], 0.8, traces=["large"])
    (file,) = (tmp_path / "results").iterdir()
    record = json.loads(file.read_text())
    assert record["settings"]["data.max_train_examples"] == 4992
    assert "traces" not in record
    assert Results(tmp_path / "results").records == results.records
