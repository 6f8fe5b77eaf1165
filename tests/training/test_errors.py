"""What goes wrong says so in a line or two, on every rank, without a traceback or a hang."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from aflora_dist.freezing import FreezingScore
from aflora_dist.training.run import main
from aflora_dist.watch.stopping import StopRequest
from tests.launch import MAIN_JOB, ROOT, launch
from tests.runs import options
from tests.small import write_reviews


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run and return what was said; it must be short."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    said = [line for line in said if line.startswith(("aflora: error:", "aflora: diverged:"))]
    assert len(said) == 1
    assert len(said[0]) < 600
    return said[0]


NO_FILES = ["--data.train_file", "null", "--data.validation_file", "null"]
OPTIONS = {
    "t_i + t_f > T": (["--freezing.initial_epochs", "1.5", "--freezing.final_epochs", "1"], "does not fit"),
    "t_i + t_p > T": (
        ["--freezing.prefix", "true", "--freezing.prefix_epochs", "9"],
        "freezing.initial_epochs + freezing.prefix_epochs = ",
    ),
    "no module matched": (["--adapter.target_modules", "[nowhere]"], "No modules were targeted"),
    "nothing freezable": (["--adapter.target_modules", "[query]"], "nothing to train and freeze"),
    "rank": (["--adapter.r", "0"], "adapter.r must be at least 1"),
    "task": (["--data.task", "imdb", *NO_FILES], "There is no task 'imdb'"),
    "preset": (["--preset", "glue/imdb"], "There is no preset 'glue/imdb'"),
    "option": (["--train.lr", "1"], "--train.lr"),
    "value": (["--train.epochs", "many"], "train.epochs"),
    "negative": (["--train.learning_rate", "-1"], "must not be negative"),
    "model": (["--model.name", "no/such-model"], "could not be loaded"),
    "file": (["--data.train_file", "nowhere.csv"], "There is no file nowhere.csv"),
    "column": (["--data.label_column", "stars"], "has no column 'stars'; its columns are: text, label"),
    "config file": (["nowhere.yaml"], "nowhere.yaml"),
    "batch": (["--train.accumulation", "17"], "cannot be split"),
    "too few": (["--train.batch_size", "200"], "fewer than one batch"),
    "glue folder": (
        ["--data.task", "cola", "--data.path", "nowhere", *NO_FILES],
        "There is no file nowhere/CoLA/train.tsv",
    ),
    "hub": (["--data.task", "cola", *NO_FILES], "could not be loaded from the hub"),
    "score": (["--freezing.score", "magic"], "freezing.score"),
    "seed": (["--train.seed", "-1"], "train.seed must not be negative"),
    "length": (["--data.max_length", "1000"], "more than the 512 positions"),
    "no ranks": (["--profile", "--profile.ranks", "[]"], "profile.ranks must be different numbers from 0 on, got []"),
    "no starts": (["--profile", "--profile.starts", "[]"], "profile.starts must be different numbers from 1 on"),
    "no such rank": (["--profile", "--profile.ranks", "[0, 3]"], "profile.ranks names rank 3; there are 1, from 0 on"),
    "negative rank": (["--profile.ranks", "[-1]"], "profile.ranks must be different numbers from 0 on, got [-1]"),
    "a rank twice": (
        ["--profile.ranks", "[1, 0, 1]"],
        "profile.ranks must be different numbers from 0 on, got [1, 0, 1]",
    ),
    "first start": (["--profile.starts", "[0]"], "profile.starts must be different numbers from 1 on, got [0]"),
    "a start twice": (["--profile.starts", "[5, 5]"], "profile.starts must be different numbers from 1 on, got [5, 5]"),
    "overlap": (["--profile.starts", "[7, 3]"], "profile.starts=[3, 7]: the windows of 4 updates from 3 and from 7"),
    "no steps": (["--profile.steps", "0"], "profile.steps must be at least 1"),
    "starts too late": (["--profile", "--profile.starts", "[3, 11]"], "Profiling does not fit"),
    "too many steps": (["--profile", "--profile.steps", "50"], "Profiling does not fit"),
    "columns of a task": (
        ["--data.task", "rte", "--data.label_column", "stars", *NO_FILES],
        "data.label_column is for data.task=files, not rte. Leave it out",
    ),
    "columns of chats": (
        ["--data.task", "sft", "--data.text_columns", "question"],
        "data.text_columns is for data.task=files, not sft. Name data.columns instead",
    ),
    "same column": (["--data.text_columns", "[label]"], "besides data.label_column"),
    "file for another task": (["--data.task", "rte"], "data.train_file is for data.task=files or sft, not rte"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_refused_before_training(
    case: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = OPTIONS[case]
    arguments = options + arguments if case == "config file" else arguments + options
    assert expected in refused(arguments, capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def with_rows(path: Path, change: Callable[[list[str]], list[str]]) -> str:
    write_reviews(path, 40, seed=3)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    return str(path)


DATA = {
    "empty split": (lambda rows: rows[:1], "train_file", ("is empty", "could not be read")),
    "one class": (lambda rows: [r.replace("negative", "positive") for r in rows], "train_file", ("one class only",)),
    "other kind": (lambda rows: [rows[0], "a film,1", "the plot,0"], "validation_file", ("has the label '1'",)),
    "one field more": (lambda rows: [*rows, "the plot, really,positive"], "train_file", ("line 42: 3 fields",)),
    "label out of range": (lambda rows: [*rows, "the plot,mixed"], "validation_file", ("has the label 'mixed'",)),
    "missing label": (lambda rows: [*rows, "the plot,"], "train_file", ("has nothing in column 'label'",)),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused(
    case: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, which, expected = DATA[case]
    said = refused([*arguments, f"--data.{which}", with_rows(tmp_path / "bad.csv", change)], capsys)
    assert any(text in said for text in expected), said


def test_a_bad_label_in_a_glue_file_is_named_with_its_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "train.tsv").write_text("x\t1\t\tFine.\nx\t7\t\tNot fine.\n")
    said = refused([*arguments, *NO_FILES, "--data.task", "cola", "--data.path", str(tmp_path)], capsys)
    assert "train.tsv, line 2: the label '7' is none of 0, 1" in said


def test_a_directory_that_holds_a_run_is_left_alone_unless_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "already holds a run" in refused(arguments, capsys)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    # a mistake in a run that would replace it does not cost the old one
    refused([*arguments, "--run.overwrite", "true", "--data.label_column", "stars"], capsys)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_somebody_else_s_files_are_not_taken_for_a_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "mine.pt").write_text("precious")
    assert "already holds a run (checkpoints)" in refused(arguments, capsys)
    assert (tmp_path / "run" / "checkpoints" / "mine.pt").read_text() == "precious"


def test_a_loss_that_breaks_names_its_step_and_leaves_valid_files(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = ["--freezing.initial_epochs", "1.5", "--freezing.final_epochs", "0"]
    wild = ["--train.learning_rate", "1e30", "--train.head_learning_rate", "1e30", *late]
    assert "The loss of step" in refused([*arguments, *wild], capsys)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] == json.loads(line)["loss"] for line in lines)
    assert not (tmp_path / "run" / "result.json").exists()


def test_an_unwritable_directory_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "could not be written to /proc/aflora/run" in refused([*arguments, "--run.dir", "/proc/aflora/run"], capsys)


@pytest.mark.distributed
def test_every_rank_ends_and_one_speaks(arguments: list[str]) -> None:
    done = launch("zero2", 2, *MAIN_JOB, *arguments, "--adapter.target_modules", "[query]", true_launch=True)
    assert done.returncode != 0
    assert done.stderr.count("aflora: error:") == 1
    assert "Error" not in done.stderr.replace("ChildFailedError", "").replace("aflora: error:", "")
    assert "exitcode  : 2" in done.stderr


@pytest.mark.distributed
def test_a_rank_that_is_left_behind_says_so_although_the_launcher_ends_it() -> None:
    done = launch("ddp", 2, str(ROOT / "tests" / "workers" / "left_behind.py"))
    assert done.returncode == -signal.SIGKILL
    assert "another rank has ended in the middle of the training" in done.stderr


@pytest.mark.distributed
def test_lonely_processes_are_noticed() -> None:
    done = launch("zero2", 2, str(ROOT / "tests" / "workers" / "lonely.py"))
    assert done.returncode != 0
    assert "2 processes were launched, but this one knows of 1" in done.stderr
    assert "of Trainer and TRL give the arguments use_cpu=True" in done.stderr


@pytest.mark.distributed
def test_a_deepspeed_file_that_cannot_be_honoured_is_refused_once(arguments: list[str], tmp_path: Path) -> None:
    """More of them in test_deepspeed_file.py."""
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    launcher = ["--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "ds.json"), "--num_processes", "2"]
    done = launch("zero2", 2, *MAIN_JOB, *arguments, launcher=[*launcher, "--num_machines", "1"])
    assert done.returncode == 2
    assert done.stderr.count("aflora: error:") == 1
    assert f'DeepSpeed\'s file {tmp_path}/ds.json: it has a section "scheduler": remove it' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_what_deepspeed_refuses_when_it_is_given_the_model_is_said_in_a_line(
    arguments: list[str], tmp_path: Path
) -> None:
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["zero_optimization"]["compute_grad_norm"] = False
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    launcher = ["--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "ds.json"), "--num_processes", "2"]
    done = launch("zero2", 2, *MAIN_JOB, *arguments, launcher=[*launcher, "--num_machines", "1"])
    assert done.returncode == 2
    assert f"aflora: error: DeepSpeed's file {tmp_path}/ds.json: " in done.stderr
    assert "compute_grad_norm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_a_full_disk_of_the_main_process_ends_every_rank_with_the_reason(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """Within an update, where the others wait for it; and the launcher's SIGTERM is no request to save and go on."""
    arguments = options(tmp_path / "run", tiny_model, reviews, **{"train.epochs": 40, "run.save_every": 0})
    done = launch("ddp", 2, str(ROOT / "tests" / "workers" / "full_log.py"), *arguments)
    assert done.returncode != 0
    assert done.stderr.count("aflora: error: freeze_log.jsonl could not be written") == 1
    assert "Stopped as asked" not in done.stdout
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 240  # it did not train on to the end


def test_a_score_that_is_not_finite_ends_the_run_with_and_without_tensorboard(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: FreezingScore, *args: object, **more: object) -> None:
        self.smoothed.fill_(float("nan"))

    monkeypatch.setattr(FreezingScore, "observe", broken)
    late = ["--freezing.initial_epochs", "1.5", "--freezing.final_epochs", "0"]  # no decision looks at the scores
    for tensorboard in ("true", "false"):
        folder = ["--run.dir", str(tmp_path / tensorboard), "--run.tensorboard", tensorboard]
        assert "is not finite after step" in refused([*arguments, *late, *folder], capsys)


@pytest.mark.parametrize("where", ["a closed pipe", "a full disk"])
def test_where_nothing_more_can_be_printed_a_training_goes_on(
    where: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = []
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe() if where == "a closed pipe" else (-1, os.open("/dev/full", os.O_WRONLY))
        if reader >= 0:
            os.close(reader)
        streams.append(os.fdopen(writer, "w"))
        monkeypatch.setattr(f"sys.{name}", streams[-1])
    status = main(arguments)
    monkeypatch.undo()
    for stream in streams:
        with suppress(OSError):
            stream.close()
    assert status == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_ctrl_c_saves_where_it_has_ended_what_standard_error_was_led_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> int:
        raise BrokenPipeError

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which `&` in a script has ignored
    try:
        with StopRequest(None, is_main=True) as request, monkeypatch.context() as patched:
            patched.setattr(os, "write", closed)
            signal.raise_signal(signal.SIGINT)
            assert request.agreed()
    finally:
        signal.signal(signal.SIGINT, before)
