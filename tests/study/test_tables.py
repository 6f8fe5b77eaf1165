"""What tables say of runs that were launched in several ways, of losses, and of names that are no plain words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from aflora_dist.study.cells import cells, compared
from aflora_dist.study.command import write_tables
from aflora_dist.study.grid import Planned
from aflora_dist.study.pictures import dots
from aflora_dist.study.results import Results
from aflora_dist.study.tables import latex, markdown
from tests.study.written import TASKS, grid_of, settle

TWO = {"a": {"adapter.freezing": "never"}, "b": {"freezing.score": "random"}}


def test_a_table_says_which_runs_were_launched_in_another_way(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods=TWO), Results(tmp_path / "results")
    way = {"engine": "single", "world_size": 1, "mixed_precision": "no"}
    runs = settle(grid, results, lambda run: {"accuracy": 0.8, **way}).reported
    assert "alike" not in markdown(grid, results.records)
    for run in runs["reviews", "b"].values():
        results.records[run.name]["mixed_precision"] = "bf16"
    expected = "Not all were launched alike (a with mixed_precision no; b with mixed_precision bf16): what differs"
    assert expected in markdown(grid, results.records)
    assert f"% {expected}" in latex(grid, results.records)
    for of_method in runs.values():
        results.records[of_method[2].name] |= {"engine": "ddp", "world_size": 2}
    expected = (
        "(a with engine ddp, world_size 2, mixed_precision no and engine single, world_size 1, mixed_precision no;"
    )
    assert expected in markdown(grid, results.records)


def test_differences_of_losses_have_their_digits_and_their_unit(tmp_path: Path) -> None:
    task = {"data.task": "sft", "data.name": "demo", "metric": "loss"}
    said = {"tasks": {"problems": task}, "methods": TWO, "compare": [["a", "b"]], "settings": {"model.name": "demo"}}
    grid, results = grid_of(tmp_path, **said), Results(tmp_path / "results")

    def loss(run: Planned) -> dict[str, Any]:
        value = 0.5 + 0.01 * run.seed + (run.method == "b") * (0.003 + 0.0001 * run.seed)
        return {"accuracy": 0.0, "metrics": {"loss": value}, "evaluations": [{"loss": value}]}

    settle(grid, results, loss)
    text = markdown(grid, results.records)
    assert "| problems | a - b | 3 | -0.0031 | -0.0033 to -0.0029 | 0.000 | a is better |" in text
    assert "over seeds, in units of loss;" in text
    (axis,) = dots(compared(grid, cells(grid, results.records))).axes
    assert axis.get_xlabel().startswith("difference in units of loss,")


def test_a_picture_of_points_and_of_losses_says_both(tmp_path: Path) -> None:
    grid, results = grid_of(tmp_path, methods=TWO, compare=[["a", "b"]]), Results(tmp_path / "results")
    settle(grid, results, lambda run: 0.8 + run.seed / 100)
    (pair,) = compared(grid, cells(grid, results.records))
    (axis,) = dots([pair]).axes
    assert axis.get_xlabel().startswith("difference in points,")
    (axis,) = dots([pair, replace(pair, metric="loss")]).axes
    assert axis.get_xlabel().startswith("difference in points and units of loss,")


def test_names_are_what_files_and_tables_can_hold(tmp_path: Path) -> None:
    said = {"title": "Two\nlines\n", "methods": {"w/o a|b^2~": {}}, "tasks": {"re/views": TASKS["reviews"]}}
    grid, results = grid_of(tmp_path, pictures=["freeze_map"], **said), Results(tmp_path / "results")
    settle(grid, results, lambda run: {"accuracy": 0.8, "frozen": {"layer.0.A": 3, "layer.1.A": 5}})
    written = {path.name for path in write_tables(grid, results, tmp_path / "tables")}
    assert "mine_froze_re-views__w-o a|b^2~.png" in written
    assert written == {path.name for path in (tmp_path / "tables").iterdir()}
    table = (tmp_path / "tables" / "mine.md").read_text()
    assert "**Two lines**" in table
    assert r"| re/views | w/o a\|b^2~ | 3 |" in table
    lines = (tmp_path / "tables" / "mine.tex").read_text().splitlines()
    assert lines[0] == "% Two lines"
    assert lines[1].startswith("% Mean")
    assert any(r"w/o a\textbar{}b\textasciicircum{}2\textasciitilde{} &" in line for line in lines)


def test_a_run_whose_last_metric_is_no_number_has_diverged(tmp_path: Path) -> None:
    """Metrics of finite predictions are finite, also of constant ones: only what is not finite is written as null."""
    grid, results = grid_of(tmp_path, methods={"a": {}}), Results(tmp_path / "results")
    broken = [{"accuracy": 0.7}, {"accuracy": float("nan")}]
    settle(grid, results, lambda run: {"accuracy": 0.8, **({} if run.seed else {"evaluations": broken})})
    assert "| reviews | a | 2 (1 diverged) | accuracy |" in markdown(grid, results.records)
