"""GLUE's own files, the hub's layout, your files, and the order of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from aflora_dist import AFLoRAError
from aflora_dist.options import DataConfig
from aflora_dist.tasks.data import Data, load_data
from aflora_dist.tasks.evaluation import compute
from aflora_dist.tasks.glue import TASKS
from aflora_dist.training.command_line import _OF_TRAINER, OPTIONS, parse


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# Two lines of each task's files, as GLUE distributes them, and the label of the first.
TSV: dict[str, tuple[str | None, list[str], Any]] = {
    "cola": (None, ['gj04\t1\t\tA "quoted word.', "gj04\t0\t*\tWords the order."], 1),
    "sst2": ("sentence\tlabel", ["hide new secretions \t0", "a fine film \t1"], 0),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tHe said.\tHe spoke.", "0\t7\t9\tA.\tB."], 1),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["1\t2\t3\tWhy?\tHow?\t0", "2\t5\t6\tA?\tB?\t1"], 0),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t4.750", "1\tg\tf\t2012\t4\tn\tn\tA man.\tA dog.\t0.5"],
        4.75,
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\ts1bp\ts2bp\ts1p\ts2p\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\t1\t1n\tg\tb\tb\tp\tp\tOne.\tTwo.\tneutral\tneutral", "1\t1\t1c\tg\tb\tb\tp\tp\tA.\tB.\tx\tcontradiction"],
        1,
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", ["0\tWhen?\tThen.\tentailment", "1\tWho?\tMe.\tnot_entailment"], 0),
    "rte": ("index\tsentence1\tsentence2\tlabel", ["0\tRain.\tWet.\tnot_entailment", "1\tA.\tB.\tentailment"], 1),
}


@pytest.mark.parametrize("task", TASKS)
def test_glue_s_own_files_are_read(task: str, tmp_path: Path) -> None:
    header, rows, label = TSV[task]
    (tmp_path / TASKS[task].folder).mkdir()
    for _, file in TASKS[task].files:
        lines = ([header] if header else []) + rows
        (tmp_path / TASKS[task].folder / file).write_text("\n".join(lines) + "\n")
    data = load_data(DataConfig(task=task, path=str(tmp_path)), seed=0)
    assert len(data.train) == 2
    assert data.train[0]["label"] == label
    assert ("text_pair" in data.train.column_names) == (len(TASKS[task].text_columns) == 2)
    assert set(data.evaluation) == set(TASKS[task].evaluation_splits)
    if task == "cola":
        assert data.train[0]["text"] == 'A "quoted word.'  # no quoting in these files


@pytest.mark.parametrize("task", TASKS)
def test_the_hub_s_layout_is_understood(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TASKS[task]
    columns: dict[str, list[Any]] = {name: [f"{name} 1", f"{name} 2"] for name in spec.text_columns}
    columns |= {"label": [0, 1] if spec.labels else [0.5, 4.0], "idx": [0, 1]}
    hub = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(columns) for split in ("train", *spec.evaluation_splits, "test")}
    )
    asked = []

    def load(*names: str, revision: None) -> datasets.DatasetDict:
        asked.append(names)
        return hub

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_data(DataConfig(task=task), seed=0)
    assert asked == [("nyu-mll/glue", task)]
    assert data.train[0]["text"] == f"{spec.text_columns[0]} 1"
    assert set(data.train.column_names) == {"text", "label"} | ({"text_pair"} if len(spec.text_columns) == 2 else set())
    assert set(data.evaluation) == set(spec.evaluation_splits)


def test_mnli_lines_without_a_gold_label_are_left_out(tmp_path: Path) -> None:
    header, rows, _ = TSV["mnli"]
    (tmp_path / "MNLI").mkdir()
    for _, file in TASKS["mnli"].files:
        (tmp_path / "MNLI" / file).write_text(
            "\n".join([header or "", rows[0], rows[1].replace("\tcontradiction", "\t-")])
        )
    assert len(load_data(DataConfig(task="mnli", path=str(tmp_path)), seed=0).train) == 1


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["no", "yes", "no"], [0, 1, 0], ["no", "yes"]),
        ([False, True, True], [0, 1, 1], "booleans"),
        ([2, 0, 1], [2, 0, 1], ["0", "1", "2"]),
        ([0.5, 1.5, 2.5], [0.5, 1.5, 2.5], None),
    ],
)
def test_your_own_files(suffix: str, labels: list[Any], expected: list[Any], names: Any, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    table = datasets.Dataset.from_dict({"a": ["x", "y", "NA"], "b": ["u", "v", "w"], "stars": labels})
    if suffix in (".csv", ".tsv"):
        table.to_csv(str(path), sep="\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        table.to_parquet(str(path))
    else:
        path.write_text("\n".join(json.dumps(row) for row in table))
    config = DataConfig(
        task="files", train_file=str(path), validation_file=str(path), text_columns=["a", "b"], label_column="stars"
    )
    data = load_data(config, seed=0)
    if names == "booleans":
        names = ["False", "True"] if suffix in (".csv", ".tsv") else ["0", "1"]  # a cell is what is written in it
    assert data.labels == names
    assert list(data.train["label"]) == expected
    assert data.evaluation["validation"][1] == {"text": "y", "text_pair": "v", "label": expected[1]}


def own(path: Path, **options: Any) -> Data:
    return load_data(DataConfig(task="files", train_file=str(path), validation_file=str(path), **options), seed=0)


@pytest.mark.parametrize(
    ("suffix", "content", "said"),
    [
        ("csv", "good film,pos\nbad film,neg\n", r"file.csv has no column 'text'; its columns are: good film, pos\."),
        ("csv", "text, label\na,1\n", r"no column 'label'; its columns are: text, ' label'\. ' label' is written othe"),
        ("csv", "Text,x\na,1\n", r"has no column 'text'; its columns are: Text, x\. 'Text' is written otherwise"),
        ("csv", "\u200btext,label\na,1\n", r"its columns are: '.u200btext', label\. '.u200btext' is written otherwise"),
        ("jsonl", '{"text": "a", "label": 0}\n{"text": 5}', r"line 2, column 'text': a number"),
        ("jsonl", '{"text": 4, "label": 0}\n{"text": 5}', r"line 1: it has '4' in column 'text', which is not text"),
        ("jsonl", '{"text": "a", "label": 0}\n{"text": ["b"]}', r"line 2: it has .* in column 'text', which is not te"),
        ("jsonl", '{"text": "a", "label": 0}\n{"label": 1}', r"line 2: it has nothing in column 'text'"),
        ("json", '{"text": {"0": "a"}, "label": {"0": 1}}', r"line 1: it has .* in column 'text', which is not text"),
    ],
)
def test_columns_that_are_not_as_they_should_be(suffix: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{suffix}"
    path.write_text(content)
    with pytest.raises(AFLoRAError, match=said):
        own(path)


def test_two_lone_quotes_in_a_csv_do_not_swallow_the_rows_between_them(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    for content in (
        'text,label\ngood,pos\n"great plot,pos\nbad,neg\nbad b",neg\n',
        'label,text\nneg,poor\npos,"great plot\nneg,bad\nneg,bad b"\n',
        'text,label\r\ngood,pos\r\n"great plot,pos\r\nbad b",neg\r\n',
        'mood,text\nneg,poor\npos,"great plot\nneg,bad\nneg,bad b"\n',
    ):
        path.write_text(content, newline="")
        columns = {"label": "mood"} if "mood" in content else {}
        with pytest.raises(AFLoRAError, match=r"file.csv, line 3: between two quotes there are whole rows"):
            own(path, columns=columns)
    path.write_text('text,label\n"Dear all,\nthank you, really",pos\nbad,neg\n')
    assert own(path).train["text"][0] == "Dear all,\nthank you, really"


def glue_file(folder: Path, task: str, change: Any) -> Path:
    """A folder of a task's files, the training file's lines changed."""
    header, rows, _ = TSV[task]
    (folder / TASKS[task].folder).mkdir()
    for split, file in TASKS[task].files:
        lines = [*([header] if header else []), *rows]
        content = "\n".join(change(lines) if split == "train" else lines) + "\n"
        (folder / TASKS[task].folder / file).write_bytes(content.encode("latin-1" if "\xe9" in content else "utf-8"))
    return folder


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("stsb", lambda lines: [*lines, lines[1].replace("4.750", "nan")], r"line 4: the label 'nan' is not a finite"),
        ("stsb", lambda lines: [*lines, lines[1].replace("4.750", "-Inf")], r"line 4: the label '-Inf' is not a fin"),
        ("stsb", lambda lines: [*lines, lines[1].replace("4.750", "1e999")], r"line 4: the label '1e999' is not a fin"),
        ("stsb", lambda lines: [*lines, lines[1].replace("4.750", "4,75")], r"line 4: the label '4,75' is not a fin"),
        ("stsb", lambda lines: [*lines, lines[1].replace("4.750", "")], r"line 4: the label '' is not a finite number"),
        ("cola", lambda lines: [*lines, "gj\t1\t\tcaf\xe9"], r"line 3: byte 10 \(0xe9\) is not UTF-8"),
        ("cola", lambda lines: [*lines, "gj\t1\t\ta\tb"], r"line 3: 5 fields, expected 4"),
        ("cola", lambda lines: [*lines, "gj\t1\t\ta\0"], r"line 3: it holds a NUL"),
        ("cola", lambda lines: [*lines, "gj\t1\t\ta\rb"], r"line 3: a carriage return"),
        ("mrpc", lambda lines: [*lines, f"{lines[1]}\tmore"], r"line 4: 6 fields, expected 5"),
        (
            "rte",
            lambda lines: ["id\tpremise\thypothesis\tlabel", *lines[1:]],
            r"no column 'sentence1'; its columns are",
        ),
        ("rte", lambda lines: [f"{lines[0]}\tlabel", *lines[1:]], r"line 1: the header names column 'label' 2 times"),
        ("rte", lambda lines: [*lines, "2\tA.\tB."], r"line 4: 3 fields, expected 4"),
        ("sst2", lambda lines: [], r"train.tsv is empty. Its first line has to name the columns"),
        ("sst2", lambda lines: lines[:1], r"the train split is empty"),
    ],
)
def test_what_is_wrong_in_a_glue_file_is_named_with_its_line(task: str, change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError, match=said):
        load_data(DataConfig(task=task, path=str(glue_file(tmp_path, task, change))), seed=0)


def test_glue_s_long_sentences_and_blank_lines_are_read(tmp_path: Path) -> None:
    folder = glue_file(tmp_path, "cola", lambda lines: [*lines, "", f"gj\t0\t\t{'x' * 150_000}"])
    data = load_data(DataConfig(task="cola", path=str(folder)), seed=0)
    assert [len(text) for text in data.train["text"]] == [15, 16, 150_000]


def test_lines_of_qqp_that_are_cut_short_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = glue_file(tmp_path, "qqp", lambda lines: [*lines[:2], "3\t4\tcut", *lines[2:], "cut"])
    data = load_data(DataConfig(task="qqp", path=str(folder)), seed=0)
    assert len(data.train) == 2
    said = f"{folder / 'QQP' / 'train.tsv'}: 2 lines that are cut short are left out, the first of them line 3.\n"
    assert capsys.readouterr().out == said


def test_metrics_against_closed_formulas() -> None:
    labels, predictions = np.array([1, 1, 1, 0, 0, 1.0]), np.array([1, 0, 1, 0, 1, 1.0])
    tp, tn, fp, fn = 3, 1, 1, 1
    mcc = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    values = compute(["accuracy", "f1", "matthews_correlation"], labels, predictions)
    assert values == pytest.approx({"accuracy": 4 / 6, "f1": 2 * tp / (2 * tp + fp + fn), "matthews_correlation": mcc})
    tp, fp, fn = 1, 1, 1  # of the other class
    assert compute(["f1"], labels, predictions, 0)["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert compute(["f1"], np.ones(3), np.ones(3), 0) == {"f1": 0.0}
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 3.0])
    assert compute(["pearson"], x, y)["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert compute(["pearson"], x, np.ones(3)) == {"pearson": 0.0}


def test_presets_are_table_5_and_give_way_to_the_command_line(tmp_path: Path) -> None:
    config, _ = parse(["--preset", "glue/mrpc"])
    assert (config.train.epochs, config.train.learning_rate, config.train.head_learning_rate) == (20, 1e-2, 8e-2)
    assert config.freezing.epochs(config.train.epochs) == (1.0, 14.0)
    assert (config.train.batch_size, config.data.max_length, config.model.name) == (
        64,
        256,
        "microsoft/deberta-v3-base",
    )
    (tmp_path / "mine.yaml").write_text("preset: glue/qnli\ntrain:\n  seed: 7\n  learning_rate: 0.5\n")
    config, resolved = parse([str(tmp_path / "mine.yaml"), "--train.learning_rate", "0.25"])
    assert (config.train.epochs, config.train.seed, config.train.learning_rate) == (10, 7, 0.25)
    (tmp_path / "again.yaml").write_text(resolved)
    assert parse([str(tmp_path / "again.yaml")])[0] == config  # config.yaml reproduces the run


def helped(capsys: pytest.CaptureFixture[str], *asked: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help", *asked])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_fits_on_a_screen_and_lists_a_group_or_all_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    first = helped(capsys)
    assert len(first.splitlines()) <= 40
    for said in (
        "--preset",
        "--model.name",
        "--data.train_file",
        "--train.learning_rate",
        "\n  freezing ",
        "--help all",
    ):
        assert said in first
    group = helped(capsys, "freezing")
    assert "--freezing.score (default: gradient)" in group
    assert "--train.epochs" not in group
    everything = helped(capsys, "all")
    assert all(f"--{name} " in everything for name in OPTIONS if name != "preset")


def test_options_of_transformers_are_led_to_ours() -> None:
    assert {ours.partition(",")[0] for ours in _OF_TRAINER.values()} <= {*OPTIONS}
    for theirs, ours in (("--lr_scheduler_type", "train.schedule"), ("--save-total-limit", "run.keep")):
        with pytest.raises(AFLoRAError, match=f"There is no option {theirs}. Here it is --{ours}"):
            parse([theirs, "1"])


def test_an_unknown_task_lists_those_that_exist() -> None:
    with pytest.raises(AFLoRAError, match="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, demo, files"):
        load_data(DataConfig(task="snli"), seed=0)


def test_what_is_held_out_serves_instead_of_the_validation_split(tmp_path: Path) -> None:
    """The reviews have 1,000 of their own; none of them is looked at, and no example is on both sides."""
    whole = load_data(DataConfig(task="demo"), seed=0)
    data = load_data(DataConfig(task="demo", hold_out=500), seed=3)
    assert (len(data.train), len(data.evaluation["validation"])) == (len(whole.train) - 500, 500)
    parts = sorted([*data.train["text"][:], *data.evaluation["validation"]["text"][:]])
    assert parts == sorted(whole.train["text"][:])
    other = load_data(DataConfig(task="demo", hold_out=500), seed=4)
    assert other.evaluation["validation"]["text"][:] != data.evaluation["validation"]["text"][:]
    with pytest.raises(AFLoRAError, match=r"hold_out=10000 leaves nothing to train on: data.task=demo has 7,530"):
        load_data(DataConfig(task="demo", hold_out=10_000), seed=0)
