"""What is wrong in a YAML file or on the command line is said in a line, with its place, and never passed over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from aflora_dist import AFLoRAError
from aflora_dist.training.command_line import parse

FILES: dict[str, tuple[str | bytes, str]] = {
    "key twice": ("train:\n  epochs: 3\n  epochs: 5\n", r"line 3: train.epochs stands there already \(line 2\)"),
    "group twice": ("train:\n  epochs: 3\ntrain:\n  seed: 5\n", r"line 3: train stands there already \(line 1\)"),
    "twice, once dotted": ("train.seed: 3\ntrain:\n  seed: 5\n", "line 3: train.seed stands there already"),
    "twice below": ("method:\n  options:\n    r: 8\n    r: 4\n", "line 4: method.options.r stands there already"),
    "unknown": ("train:\n  epoch: 3\n", "line 2: there is no option train.epoch. Did you mean train.epochs?"),
    "unknown group": ("defaults:\n  - base\n", "line 1: there is no option defaults. `aflora train --help`"),
    "other file": ("config: more.yaml\n", "line 1: there is no option config"),
    "tab": ("train:\n\tepochs: 3\n", r"line 2, column 1 is not YAML: .*'\\t'"),
    "indentation": ("train:\n  epochs: 3\n seed: 4\n", "line 3, column 2 is not YAML"),
    "documents": ("train:\n  epochs: 3\n---\n", "line 3, column 1 is not YAML: expected a single document"),
    "empty": ("", "sets no option: it is empty"),
    "comments": ("# train:\n", "sets no option"),
    "list": ("- train\n", "must hold options by group"),
    "null": ("train:\n  epochs:\n", "line 2: train.epochs has no value. Give one"),
    "null list": ("run:\n  trackers:\n", "line 2: run.trackers has no value"),
    "tilde": ("run:\n  dir: ~\n", "line 2: run.dir has no value"),
    "null group": ("train:\n#  epochs: 3\n", "line 1: train must hold options, indented in the lines below it"),
    "no colon": ("train:\n  epochs 3\n", "line 1: train must hold options"),
    "octal": ("train:\n  seed: 010\n", "line 2: train.seed: to YAML, 010 is no decimal number"),
    "sixties": ("train:\n  batch_size: 1:30\n", "1:30 is no decimal number"),
    "sixties of a float": ("train:\n  learning_rate: 1:30.5\n", "line 2: train.learning_rate: to YAML, 1:30.5 is no"),
    "octal below": ("method:\n  options:\n    r: 8\n    a: {b: 010}\n", "line 4: method.options.a.b: to YAML, 010 is"),
    "sixties below": ("method:\n  options: {lora_alpha: 1:30}\n", "method.options.lora_alpha: to YAML, 1:30 is no"),
    "octal weight": ("data:\n  mix: {b.csv: 010}\n", "line 2: data.mix.b.csv: to YAML, 010 is no decimal number"),
    "octal in a list": ("profile:\n  starts:\n  - 8\n  - 010\n", "line 4: profile.starts: to YAML, 010 is no decimal"),
    "twice far below": ("method:\n  options: {a: [{b: 1, b: 2}]}\n", "method.options.a.b stands there already: keep"),
    "alias of itself": ("method:\n  options: &a {a: *a, b: 010}\n", "method.options.b: to YAML, 010 is no decimal"),
    "fraction": ("train:\n  epochs: 2.5\n", "line 2: train.epochs must be a whole number, not 2.5"),
    "truth": ("data:\n  label_column: no\n", "line 2: data.label_column must be text .*quotes.*, not no"),
    "text for a list": ("run:\n  trackers: wandb\n", r"line 2: run.trackers must be a list .*\[a, b\], not wandb"),
    "choice": ("model:\n  dtype: bf16\n", "must be one of float32, bfloat16, float16, or null, not bf16"),
    "infinite": ("train:\n  learning_rate: .inf\n", "train.learning_rate must be a finite number, not inf"),
    "key of yes": ("data:\n  columns: {on: text}\n", "line 2: data.columns: to YAML, on is no text. Put it into"),
    "utf-16": ("train:\n  epochs: 3\n".encode("utf-16"), "is not text in UTF-8 .byte 0"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_says_something_wrong_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    content, expected = FILES[case]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AFLoRAError) as caught:
        parse([str(path)])
    said = str(caught.value)
    assert re.search(expected, said), said
    assert str(path) in said or case == "infinite"
    assert "\n" not in said


def test_a_file_is_named_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    for name, expected in {
        "train.csv": "is a file of data, .*: --data.train_file .*train.csv, with --data.task files",
        "nowhere.yaml": "There is no file",
        ".": "Is a directory",
        "loop.yaml": "could not be read: Too many levels",
    }.items():
        for option in ([str(tmp_path / name)], ["--config", str(tmp_path / name)], [f"--config={tmp_path / name}"]):
            with pytest.raises(AFLoRAError, match=expected):
                parse(option)


def test_files_as_people_write_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbftrain:\r\n  learning_rate: 1e-3\r\n  epochs: 30\r\nmethod: {name: aflora}\r\n")
    assert parse([str(path)])[0].train.learning_rate == 1e-3
    path.write_text('{"train": {"epochs": 7}, "run": {"resume": null}}')
    assert parse([str(path)])[0].train.epochs == 7
    _, resolved = parse(["--preset", "glue/rte", "--train.seed", "3"])
    path.write_text(resolved)  # an old run's config.yaml
    assert yaml.safe_load(parse([str(path)])[1]) == yaml.safe_load(resolved)


OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown": (["--train.lr", "1"], r"no option --train.lr. Did you mean --train.learning_rate\?"),
    "without group": (["--batch_size", "8"], r"Did you mean --train.batch_size\?"),
    "dash": (["--train.batch-size=8"], r"Did you mean --train.batch_size\?"),
    "launcher's": (["--num_processes", "2"], "the launcher's, and stands before the module: `accelerate launch"),
    "deepspeed's": (["--local_rank=0"], "the launcher's"),
    "spaced list": (["--data.text_columns", "a", "b"], "lists are written"),
    "no folder": (["--run.dir", ""], "run.dir is empty"),
    "home": (["--run.dir=~/runs/x"], "run.dir=~/runs/x would be a folder of just that name"),
    "variable": (["--run.dir", "$HOME/x"], "would be a folder of just that name"),
    "address": (["--run.dir", "s3://bucket/x"], "would be a folder of just that name"),
    "long": (["--run.dir", "x" * 300], "cannot be a run's folder: File name too long"),
    "seed": (["--train.seed", str(2**32)], "train.seed must be less than 4294967296"),
    "tracker twice": (["--run.trackers", "tensorboard,tensorboard"], "names tensorboard twice"),
    "no value": (["--run.dir", "--train.seed", "1"], "--run.dir has no value"),
    "no value at the end": (["--train.seed"], "--train.seed has no value"),
    "tracker of none": (["--run.trackers", "none"], "Trackers: tensorboard, wandb"),
    "share": (["--train.warmup_ratio", "1.5"], "train.warmup_ratio must be at most 1, got 1.5"),
    "decay": (["--freezing.beta2", "1.0"], "freezing.beta2 must be less than 1, got 1.0"),
    "pairs": (["--freezing.pairwise=true", "--freezing.rule=quantile"], "freezing.rule=quantile judges each matrix"),
    "of a task": (["--data.packing", "true"], "data.packing is for data.task=sft, not demo"),
    "loss of a classifier": (["--data.loss_on", "all"], "data.loss_on is for data.task=sft, not demo"),
    "sixties": (["--train.epochs", "1:30"], "train.epochs: to YAML, 1:30 is no decimal number"),
    "octal": (["--train.seed=010"], "train.seed: to YAML, 010 is no decimal number"),
    "octal weight": (["--data.mix", '{"a.csv":010}'], "data.mix.a.csv: to YAML, 010 is no decimal number"),
    "octal below": (["--method.options", '{"r":010}'], "method.options.r: to YAML, 010 is no decimal number"),
    "octal name": (["--method.options.r", "010"], "method.options.r: to YAML, 010 is no decimal number"),
    "octal in a list": (["--profile.starts", "010,020"], "profile.starts: to YAML, 010 is no decimal number"),
    "octal in a group": (["--train", '{"epochs":010}'], "train.epochs: to YAML, 010 is no decimal number"),
    "key twice": (["--data.mix", '{"a.csv": 1, "a.csv": 2}'], "data.mix.a.csv stands there already: keep one"),
    "key twice in a group": (["--train", '{"epochs": 1, "epochs": 2}'], "train.epochs stands there already: keep one"),
    "unknown in a group": (["--train", '{"epoch": 1}'], r"no option --train.epoch. Did you mean --train.epochs\?"),
    "no group": (["--train", "3"], "train must hold options, as in --train '{NAME: VALUE, ...}', not 3"),
    "dot in a name": (["--data.mix.more.jsonl", "2"], "is given as in --data.mix '{\"more.jsonl\": VALUE}'"),
    "dot in a column": (["--data.columns.a.b", "x"], "is given as in --data.columns '{\"a.b\": VALUE}'"),
    "empty preset": (["--preset", ""], "There is no preset ''. Presets: demo"),
    "kind": (["--model.dtype", "fp16"], "model.dtype must be one of float32, bfloat16, float16, or null, not fp16"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_told_with_what_may_have_been_meant(case: str) -> None:
    arguments, expected = OPTIONS[case]
    with pytest.raises(AFLoRAError, match=expected):
        parse(arguments)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (["--dry_run"], True),
        (["--dry-run"], True),
        (["--dry_run", "true"], True),
        (["--dry_run=false"], False),
        (["--dry_run", "--train.seed", "1"], True),
    ],
)
def test_a_switch_may_have_a_value(said: list[str], meant: bool) -> None:
    assert parse(said)[0].run.dry_run is meant


def test_resume_may_have_a_value_either_way() -> None:
    for said in (["--resume"], ["--resume=last"], ["--resume", "last"], ["--resume", "--train.seed", "1"]):
        assert parse(said)[0].run.resume == "last"


@pytest.mark.parametrize(
    ("option", "value"), [("trust_remote_code", "true"), ("attn_implementation", "kernels-community/flash-attn")]
)
def test_only_the_command_line_has_code_of_others_run(option: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"train:\n  epochs: 3\nmodel:\n  {option}: {value}\n")
    with pytest.raises(AFLoRAError, match=rf"config.yaml, line 4: only the command line .* --model.{option} {value}"):
        parse([str(file)])
    for said in ([f"--model.{option}", value], [f"--model.{option}={value}"]):
        assert str(getattr(parse([str(file), *said])[0].model, option)).lower() == value
    file.write_text(f"model:\n  {option}: {'false' if value == 'true' else 'sdpa'}\n")
    parse([str(file)])


SFT = ["--model.name", "m", "--data.task", "sft", "--data.train_file", "x.jsonl"]


@pytest.mark.parametrize("text", ["# Role: tutor", "---", "&a", "null and void", "# Role: tutor\nBe brief."])
def test_a_text_in_which_yaml_reads_nothing_is_that_text(text: str, tmp_path: Path) -> None:
    config, resolved = parse([*SFT, f"--data.system={text}"])
    assert config.data.system == text
    (tmp_path / "again.yaml").write_text(resolved)
    assert parse([str(tmp_path / "again.yaml")])[0].data.system == text


def test_null_is_a_text_where_it_is_quoted(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for written, expected in {"'null'": "null", '"~"': "~", "null": None, "~": None}.items():
        file.write_text(f"data:\n  system: {written}\n")
        assert parse([str(file), *SFT])[0].data.system == expected
        for null in ("null", "NULL", "~"):
            assert parse([str(file), *SFT, "--data.system", null])[0].data.system is None


def test_names_and_numbers_are_given_on_the_command_line() -> None:
    assert parse([*SFT, "--data.mix", '{"a.jsonl": 0.5}'])[0].data.mix == {"a.jsonl": 0.5}
    assert parse([*SFT, "--data.columns", '{"prompt": "01:2"}'])[0].data.columns == {"prompt": "01:2"}
    assert parse([*SFT, "--data.columns.prompt", "01:2"])[0].data.columns == {"prompt": "01:2"}


def test_a_group_s_options_are_options() -> None:
    train = parse(["--train.epochs", "5", "--train", '{"epochs": 3, "seed": 4}', "--train.epochs", "7"])[0].train
    assert (train.epochs, train.seed) == (7, 4)
    later = ["--train", '{"epochs": 3}', "--train", '{"seed": 4, "optimizer_options": {"betas": [0.5, 0.9]}}']
    train = parse(later)[0].train
    assert (train.epochs, train.seed, train.optimizer_options) == (3, 4, {"betas": [0.5, 0.9]})
    model = parse([*SFT, "--model", '{"name": "mine", "trust_remote_code": true}'])[0].model
    assert (model.name, model.trust_remote_code) == ("mine", True)
    options = ["--method.name", "lora", "--method.options.r", "4", "--method.options", '{"r": 8}']
    assert parse([*options, "--method.options.r", "2"])[0].method.options == {"r": 2}


@pytest.mark.parametrize("revision", ["12e4567", "1e5", "1.5e3", "1.e5", "1_000e5", "0x1f", "12345678", "on"])
def test_a_revision_that_looks_like_a_number_is_read_again(revision: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"model:\n  revision: '{revision}'\n")
    _, resolved = parse([str(file)])
    file.write_text(resolved)
    assert parse([str(file)])[0].model.revision == revision


def test_what_is_left_behind_asks_for_nothing_to_be_deleted_or_taken_up() -> None:
    for said, meant in ((["--run.overwrite", "true"], (True, None)), (["--resume"], (False, "last"))):
        config, resolved = parse(said)
        assert (config.run.overwrite, config.run.resume) == meant
        left = yaml.safe_load(resolved)["run"]
        assert (left["overwrite"], left["resume"]) == (False, None)
