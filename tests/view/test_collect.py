"""`aflora collect` among whatever lies in a folder of runs: the table of the good ones, a line for each odd thing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import SHARED
from tests.runs import command
from tests.view.written import write_run

collect = command("collect")


class Collected:
    """What `aflora collect FOLDER` came to."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        table = folder.parent / "table.json"
        self.status = collect([str(folder), "--json", str(table)])
        self.printed, said = capsys.readouterr()
        self.warnings = [line.removeprefix("aflora: warning: ") for line in said.splitlines()]
        self.rows: list[dict[str, Any]] = json.loads(table.read_text()) if self.status == 0 else []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three seeds of one setting."""
    monkeypatch.setenv("COLUMNS", "200")
    for seed, accuracy in enumerate((0.7, 0.75, 0.8)):
        write_run(tmp_path / "runs" / f"seed_{seed}", seed, accuracy, seconds=3.0 + seed)
    return tmp_path / "runs"


def test_three_seeds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert (row["seeds"], row["unfinished"], found.warnings) == (3, 0, [])
    assert row["mean"] == pytest.approx(0.75)
    assert row["deviation"] == pytest.approx(statistics.stdev([0.7, 0.75, 0.8]))


def test_what_decides_which_weights_are_the_result_makes_another_setting(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "seed_1" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**config, "run": {**config.get("run", {}), "keep_best": "accuracy"}}))
    assert sorted(row["seeds"] for row in Collected(folder, capsys).rows) == [1, 2]


FOREIGN = {
    "hydra": b"model:\n  _target_: x.Y\ntrain: {lr: 0.1}\ndata: imagenet\n",
    "tags": b"a: !!python/object:x.Y {}\n",
    "own tags": b"theme: !ENV [A, b]\n",
    "broken": b"a: b: c\n\t- x\n",
    "latin-1": "name: Universit\u00e4t\n".encode("latin-1"),
    "nul bytes": b"\0\0\0\0",
    "utf-16": "a: 1\n".encode("utf-16"),
    "empty": b"",
    "a list": b"- 1\n- 2\n",
    "a date that is none": b"when: 2024-13-45\n",
    "deep": b"[" * 20_000,
    "alias to itself": b"model: &a {name: x, self: *a}\ndata: {task: x}\ntrain: {seed: 0}\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "keys that are no text": b"? [1, 2]\n: x\n? {a: 1}\n: y\n",
    "wandb": b"train.epochs:\n  value: 3\nwandb_version: 1\n",
    "large": b"a: 1\n" * 300_000,
}
READABLE = {"hydra", "empty", "a list", "alias to itself", "wandb", "large", "utf-16"}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_programs_configurations_are_passed_over(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = folder / "another"
    other.mkdir()
    (other / "config.yaml").write_bytes(FOREIGN[kind])
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert row["seeds"] == 3
    said = [str(other / "config.yaml") in warning for warning in found.warnings]
    assert said == ([] if kind in READABLE else [True])


def test_the_shared_cases(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = SHARED / "cases" / "43_collect_foreign_config"
    if not cases.is_dir():
        pytest.skip("no such folder beside the checkout")
    shutil.copytree(cases, folder / "cases")
    found = Collected(folder, capsys)
    assert (found.status, found.rows[0]["seeds"], len(found.warnings)) == (0, 3, 2)


def test_a_copied_run_counts_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "seed_1", folder / "backup" / "seed_1")
    for name in ("metrics.jsonl", "freeze_log.jsonl"):  # a copy of what matters
        (folder / "backup" / "seed_1" / name).unlink()
    shutil.copytree(folder / "seed_2", folder / "a copy")
    (folder / "a copy" / "result.json").unlink()  # copied before the run had ended
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert (row["seeds"], row["unfinished"], row["mean"]) == (3, 0, pytest.approx(0.75))
    assert found.warnings == [
        f"{folder / 'seed_1'} is a copy of {folder / 'backup' / 'seed_1'}, counted once.",
        f"{folder / 'a copy'} is a copy of {folder / 'seed_2'}, counted once.",
    ]


def test_a_seed_that_was_run_twice_is_one_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(folder / "seed_0_again", 0, 0.6, seconds=7.25)
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert (row["seeds"], row["mean"]) == (3, pytest.approx(statistics.fmean([0.65, 0.75, 0.8])))
    assert found.warnings == [f"{folder / 'seed_0_again'} is another run with seed 0: their mean counts, once."]


def test_a_run_that_goes_on_and_one_whose_result_is_cut_are_unfinished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "seed_0" / "result.json").unlink()
    log = (folder / "seed_0" / "metrics.jsonl").read_bytes()
    (folder / "seed_0" / "metrics.jsonl").write_bytes(log[:-20])
    result = (folder / "seed_1" / "result.json").read_bytes()
    (folder / "seed_1" / "result.json").write_bytes(result[:-20])
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert (row["seeds"], row["unfinished"], row["mean"]) == (1, 2, 0.8)
    (warning,) = found.warnings
    assert warning.startswith(f"{folder / 'seed_1' / 'result.json'} is cut or damaged")


@pytest.mark.parametrize(
    "result", [b"", b"[]", b"3", b"{}", b'{"metrics": 1}', b"\xff\xfe", b"[" * 100_000, b"1" * 9000]
)
def test_a_result_that_is_none(result: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "seed_0" / "result.json").write_bytes(result)
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert (row["seeds"], row["unfinished"], len(found.warnings)) == (2, 1, 1)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "null", '"high"', "true"])
def test_a_metric_that_is_not_a_number_does_not_count(
    value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "seed_0" / "result.json"
    file.write_text(file.read_text().replace('"accuracy": 0.7}', f'"accuracy": {value}}}'))
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert (row["seeds"], row["mean"]) == (2, pytest.approx(0.775))
    assert found.warnings == [f"{folder / 'seed_0'}: accuracy is not a number in its result; it does not count."]


def test_runs_of_earlier_releases_lack_fields_and_sections(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((folder / "seed_0" / "config.yaml").read_text())
    config["method"] = {"name": "aflora"}
    (folder / "seed_0" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "seed_1" / "result.json").write_text('{"metrics": {"accuracy": 0.9}}')
    found = Collected(folder, capsys)
    later, earlier = sorted(found.rows, key=lambda row: row["seeds"])
    assert (later["differs in"], earlier["differs in"]) == ("method.name=aflora", "method.name=not given")
    assert (earlier["seeds"], earlier["mean"], earlier["seconds"]) == (2, pytest.approx(0.85), 5.0)
    assert found.warnings == []


def test_two_epochs_are_two_however_they_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (folder / "seed_0" / "config.yaml").read_text()
    (folder / "seed_0" / "config.yaml").write_text(config.replace("epochs: 2", "epochs: 2.0"))
    (row,) = Collected(folder, capsys).rows
    assert row["seeds"] == 3


def test_links_in_a_circle_and_twice_to_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "seed_0" / "up").symlink_to(folder)
    (folder / "round").symlink_to(folder / "round")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "config.yaml").symlink_to(folder / "nowhere")
    elsewhere = write_run(folder.parent / "elsewhere", 3, 0.85, seconds=9.0)
    (folder / "seed_3").symlink_to(elsewhere)
    (folder / "seed_3_again").symlink_to(elsewhere)
    found = Collected(folder, capsys)
    (row,) = found.rows
    assert row["seeds"] == 4
    assert found.warnings == [f"{folder / 'config.yaml'} could not be read: No such file or directory."]


def test_what_is_no_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "result.json", "metrics.jsonl"):
        (folder / name).mkdir(parents=True)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "config.yaml")
    (folder / "seed_0" / "metrics.jsonl").unlink()
    os.mkfifo(folder / "seed_0" / "metrics.jsonl")
    found = Collected(folder, capsys)
    assert found.rows[0]["seeds"] == 3
    assert len(found.warnings) == 3


def test_what_may_not_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is to others than root."""
    hidden = {str(folder / "seed_0"), str(folder / "seed_1" / "config.yaml")}

    def refusing(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refused(path: Any) -> Any:
            if str(path) in hidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path)

        return refused

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
    found = Collected(folder, capsys)
    assert found.rows[0]["seeds"] == 1
    assert [warning.endswith("could not be read: Permission denied.") for warning in found.warnings] == [True, True]


def test_text_that_a_terminal_takes_for_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (folder / "seed_0" / "config.yaml").read_text()
    (folder / "seed_0" / "config.yaml").write_text(config.replace("name: tiny", r'name: "[/red]\e[31m:smile:"'))
    found = Collected(folder, capsys)
    assert "[/red]?[31m:smile:" in found.printed
    assert len(found.rows) == 2


@pytest.mark.parametrize("what", ["nothing", "a file", "no folder"])
def test_no_run_is_an_error_in_a_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    if what == "nothing":
        folder.mkdir()
    elif what == "a file":
        folder.touch()
    assert collect([str(folder)]) == 2
    said = "no run under" if what == "nothing" else "no folder"
    assert capsys.readouterr().err == f"aflora: error: There is {said} {folder}.\n"


@pytest.mark.parametrize("columns", [None, "60", "80"])
def test_no_number_is_cut_whatever_the_width(
    columns: str | None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    for result in folder.glob("*/result.json"):
        result.write_text(json.dumps(json.loads(result.read_text()) | {"avg_trainable_params": 1234567.0}))
    printed = Collected(folder, capsys).printed
    assert "…" not in printed
    assert "1,234,567" in printed
    assert "0.7500 ± 0.0500" in printed


def test_runs_that_were_launched_otherwise_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Collected(folder, capsys).warnings == []
    file = folder / "seed_2" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"engine": "single", "world_size": 1}))
    (warning,) = Collected(folder, capsys).warnings
    assert f"{file.parent} ran as 1 x single, {folder / 'seed_0'} as 2 x zero2" in warning
