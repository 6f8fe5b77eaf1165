"""Data from anywhere: sets as they lie on the hub, several of them, with columns, splits and subsets of their own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aflora_dist import AFLoRAError
from aflora_dist.options import DataConfig
from aflora_dist.tasks.data import load_data
from aflora_dist.tasks.labels import given_labels
from aflora_dist.tasks.reading import read_table
from aflora_dist.tasks.sft.encode import Encoder
from aflora_dist.tasks.sft.examples import load_examples, turns
from aflora_dist.tasks.sft.task import last_number
from aflora_dist.training.command_line import parse
from tests.runs import command_line, start
from tests.small_lm import make_small_language_model, make_small_tokenizer
from tests.tasks import hub_sets

COLUMNS = {"prompt": "question", "completion": "answer"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sft(**options: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    return load_examples(DataConfig(task="sft", **options), seed=0)


def test_gsm8k_is_taken_by_its_preset_and_its_answers_are_numbers(tmp_path: Path) -> None:
    folder = hub_sets.gsm8k(tmp_path / "gsm8k")
    config, resolved = parse(["--preset", "llm/gsm8k", "--model.name", "m", "--data.name", str(folder)])
    train, held = load_examples(config.data, seed=0)
    assert train.column_names == ["prompt", "completion"]
    assert [(row["prompt"], row["completion"]) for row in train] == hub_sets.GSM8K
    assert [last_number(answer) for answer in held["answer"]] == [7, 1234, 7, 12]
    (tmp_path / "again.yaml").write_text(resolved)
    assert parse([str(tmp_path / "again.yaml")])[0].data == config.data


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"has several subsets. data.subset is one of: main, socratic\."),
        ({"subset": "mian"}, r"has no subset 'mian'. data.subset is one of: main, socratic\."),
        (
            {"subset": "main", "train_split": "training"},
            r"no split named training; it has: train, test. data.train_spl",
        ),
        (
            {"subset": "main", "validation_split": "dev", "columns": COLUMNS},
            r"no split named dev; it has: train, test. data.validation_sp",
        ),
        ({"subset": "main"}, r"has the columns question, answer, .*data.columns says which"),
        (
            {"subset": "main", "columns": {"prompt": "ask"}},
            r"gsm8k \(main, train\) has no column 'ask'; its columns ar",
        ),
    ],
)
def test_what_a_data_set_has_is_said_where_something_else_is_asked_for(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(AFLoRAError, match=said):
        sft(name=str(hub_sets.gsm8k(tmp_path / "gsm8k")), **options)


def test_splits_have_any_name_and_are_sliced_as_datasets_writes_it(tmp_path: Path) -> None:
    name = str(hub_sets.ultrachat(tmp_path / "ultrachat"))
    with pytest.raises(AFLoRAError, match="it has: train_sft, test_sft, train_gen, test_gen"):
        sft(name=name)
    train, held = sft(name=name, train_split="train_sft[:75%]+train_gen[-1:]", validation_split="test_sft[2:5]")
    assert (len(train), len(held)) == (7, 3)
    assert train[0]["messages"][3] == {"role": "assistant", "content": "The answer is 4 ."}
    with pytest.raises(
        AFLoRAError, match=r"ultrachat has no examples for evaluation: name data.val.*of its 8 examples"
    ):
        sft(name=name, train_split="train_sft")


def test_a_classifier_s_data_set_of_the_hub_keeps_the_names_and_numbers_of_its_labels(tmp_path: Path) -> None:
    name = str(hub_sets.ag_news(tmp_path / "news"))
    data = load_data(DataConfig(task="files", name=name), seed=0)
    assert data.labels == ["World", "Sports", "Business", "Sci/Tech"]
    assert data.train[:4] == {"text": ["great film", "poor plot", "fine day", "bad news"], "label": [0, 1, 2, 3]}
    assert len(data.evaluation["validation"]) == 8
    with pytest.raises(AFLoRAError, match=r"The split train\[:0%\] of the data set .* is empty"):
        load_data(DataConfig(task="files", name=name, validation_split="train[:0%]"), seed=0)


def test_a_split_whose_labels_are_hidden_is_refused(tmp_path: Path) -> None:
    name = hub_sets.ag_news(tmp_path / "news")
    file = name / "data" / "test-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(file)).to_list()
    hub_sets._parquet(file, [{**rows[0], "label": -1}, *rows[1:]])
    with pytest.raises(AFLoRAError, match=r"news \(test\), row 1: its label is -1, which is none of World, Sports"):
        load_data(DataConfig(task="files", name=str(name)), seed=0)
    held = load_data(DataConfig(task="files", name=str(name), hold_out=5), seed=0)
    assert [len(held.train), *map(len, held.evaluation.values())] == [15, 5]


def test_a_data_set_that_is_a_script_says_where_it_lies_as_parquet(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("import datasets\n")
    with pytest.raises(AFLoRAError, match=r"is a script, and none is run\. .*data\.revision=refs/convert/parquet"):
        load_data(DataConfig(task="files", name=str(tmp_path / "old")), seed=0)


@pytest.mark.parametrize("form", [("prompt", "completion"), ("instruction", "output"), ("messages",)])
def test_what_the_system_says_may_stand_in_a_column_of_its_own(form: tuple[str, ...], tmp_path: Path) -> None:
    """As in Open-Orca/OpenOrca: system_prompt, question, response."""
    chat = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "3"}]
    others = {"messages": chat} if form == ("messages",) else {"question": "how many ?", "response": "3"}
    rows = [{"system_prompt": said, **others} for said in ("answer .", "", None)]
    (tmp_path / "orca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"system": "system_prompt", **({} if form == ("messages",) else dict(zip(form, others, strict=True)))}
    file = str(tmp_path / "orca.jsonl")
    found, _ = load_examples(DataConfig(task="sft", train_file=file, validation_file=file, columns=columns), seed=0)
    said = [turns(row, "by default .") for row in found]
    assert [[turn["content"] for turn in chat] for chat in said] == [
        [system, "how many ?", "3"] for system in ("answer .", "by default .", "by default .")
    ]


def test_sharegpt_becomes_the_same_tokens_as_messages(tmp_path: Path) -> None:
    train, held = sft(name=str(hub_sets.sharegpt(tmp_path / "sharegpt")), hold_out=2)
    assert (len(train), len(held)) == (4, 2)
    encode = Encoder(make_small_tokenizer(), 200, "completions", None, "it")
    messages = [
        {"role": "system", "content": "answer ."},
        {"role": "user", "content": "how many apples ?"},
        {"role": "assistant", "content": "Ada has 3 ."},
    ]
    wanted = encode({"messages": [messages]})
    assert {name: values[:1] for name, values in encode(train[:]).items()} == wanted
    called = [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]
    asked = [{"from": "human", "value": "how"}, *called, {"from": "observation", "value": "3"}]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"conversations": asked, "system": "be brief"}))
    (row,) = sft(train_file=str(tmp_path / "calls.jsonl"), validation_file=str(tmp_path / "calls.jsonl"))[0]
    function = {"name": "f", "arguments": {"x": 1}}
    assert turns(row, "another") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "3"},
    ]
    (tmp_path / "odd.jsonl").write_text(json.dumps({"conversations": [{"from": "narrator", "value": "x"}]}))
    with pytest.raises(AFLoRAError, match=r"line 1: column conversations has a turn from 'narrator'; known are: human"):
        sft(train_file=str(tmp_path / "odd.jsonl"), hold_out=1)


def test_sets_are_mixed_by_weight_whatever_their_columns(tmp_path: Path) -> None:
    gsm8k = hub_sets.gsm8k(tmp_path / "gsm8k", times=5)  # 20 rows
    for name in ("chats", "more"):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(
                json.dumps(
                    {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "Ada"}]}
                )
                for i in range(6)
            )
        )
    options: dict[str, Any] = {
        "train_file": str(tmp_path / "chats.jsonl"),
        "mix": {f"{gsm8k}:main": 0.5, str(tmp_path / "more.jsonl"): 2},
        "hold_out": 9,
    }
    with pytest.raises(AFLoRAError, match=r"gsm8k \(main, train\) has the columns question, answer, which are none"):
        sft(**options)
    mixed = {**options, "columns": COLUMNS}
    train, held = sft(**mixed)
    first = [[row["messages"][0]["content"] for row in rows] for rows in (train, held)]
    trained, measured = (Counter(words if words[-1].isdigit() else "gsm8k" for words in split) for split in first)
    kept = 20 - measured.pop("gsm8k")
    assert kept < 20  # some of each are held out, and half of the others trained on
    assert trained.pop("gsm8k") == round(kept / 2)
    times = {f"{name} {i}": times for name, times in (("chats", 1), ("more", 2)) for i in range(6)}
    assert len(measured) == 9 - (20 - kept) > 1
    assert trained == {words: count for words, count in times.items() if words not in measured}
    again = sft(**mixed)
    assert [row["messages"] for row in again[0]] == [row["messages"] for row in train]  # drawn by the seed


def test_a_weight_by_which_nothing_is_trained_on_is_refused(tmp_path: Path) -> None:
    for name, rows in (("a", 4), ("b", 2)):
        (tmp_path / f"{name}.csv").write_text(
            "text,label\n" + "".join(f"{name}{row},{row % 2}\n" for row in range(rows))
        )
    options = {"task": "files", "train_file": str(tmp_path / "a.csv"), "hold_out": 1}
    with pytest.raises(AFLoRAError, match=r"data.mix: weight 0.1 of [12] examples \(2 less those held out\) is none"):
        load_data(DataConfig(mix={str(tmp_path / "b.csv"): 0.1}, **options), seed=0)


def test_a_set_that_is_mixed_with_itself_is_held_out_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{text > 'd'}\n" for text in "abcdefgh"))
    mix = {str(tmp_path / ".." / tmp_path.name / "a.csv"): 2.0}
    data = load_data(DataConfig(task="files", train_file=str(tmp_path / "a.csv"), mix=mix, hold_out=3), seed=0)
    held = data.evaluation["validation"]["text"][:]
    assert len(held) == 3
    assert Counter(data.train["text"][:]) == {text: 3 for text in "abcdefgh" if text not in held}


@pytest.mark.parametrize("spelling", ["{}/", "{}:default", "{}/train.jsonl"])
def test_what_is_held_out_is_not_trained_on_under_another_name(spelling: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = [{"prompt": f"what is {i} ?", "completion": f"Ada {i}"} for i in range(8)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held = sft(name=str(tmp_path / "set"), mix={spelling.format(tmp_path / "set"): 1.0}, hold_out=3)
    assert len(held) == 3
    assert Counter(train["prompt"][:]) == {r["prompt"]: 2 for r in rows if r["prompt"] not in held["prompt"][:]}


def test_a_split_is_of_the_set_that_it_was_said_of(tmp_path: Path) -> None:
    chat, gsm8k = hub_sets.ultrachat(tmp_path / "chats"), hub_sets.gsm8k(tmp_path / "gsm8k", times=5)
    options: dict[str, Any] = {"columns": COLUMNS, "hold_out": 1}
    alone = len(sft(name=str(chat), train_split="train_sft", hold_out=1)[0])
    mixed = sft(name=str(chat), train_split="train_sft", mix={f"{gsm8k}:main": 1.0}, **options)[0]
    assert len(mixed) == alone + 20
    of_its_own = sft(name=str(chat), train_split="train_sft", mix={f"{gsm8k}:main:test[:3]": 1.0}, **options)[0]
    assert len(of_its_own) == alone + 3
    with pytest.raises(AFLoRAError, match=r"no split named train; .* .*chats::SPLIT in data.mix names one"):
        sft(name=str(gsm8k), subset="main", mix={str(chat): 1.0}, **options)


def test_what_is_trained_on_is_not_measured_with(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, size in (("train", 4), ("validation", 3), ("test", 2)):
        (folder / f"{split}.jsonl").write_text("".join(f'{{"text": "{split} {i}"}}\n' for i in range(size)))
    assert [len(rows) for rows in sft(name=str(folder))] == [4, 3]
    assert [len(rows) for rows in sft(name=str(folder), train_split="train+validation[:2]")] == [6, 2]
    with pytest.raises(AFLoRAError, match="has no examples for evaluation"):
        sft(name=str(folder), train_split="train+validation+test")


def test_columns_that_are_named_are_those_that_are_read(tmp_path: Path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    row = {"prompt": "p", "completion": "c", "question": "q", "answer": "a"}
    file.write_text(json.dumps({**row, "messages": [{"role": "user", "content": "m"}]}))
    options: dict[str, Any] = {"train_file": str(file), "validation_file": str(file)}
    train, _ = sft(columns=COLUMNS, **options)
    assert train[:] == {"prompt": ["q"], "completion": ["a"]}
    with pytest.raises(AFLoRAError, match=r"a.jsonl has no column 'questoin'; its columns are: prompt, completion,"):
        sft(columns={"prompt": "questoin"}, **options)
    # One that has what is meant under its own names keeps it, though a column is called as another's.
    file.write_text(json.dumps({"question": "q", "answer": "a"}))
    other.write_text(json.dumps({"prompt": "p", "completion": "c", "answer": "7"}))
    train, _ = sft(columns=COLUMNS, mix={str(other): 1.0}, **options)
    assert [[turn["content"] for turn in row["messages"]] for row in train] == [["q", "a"], ["p", "c"]]


def test_classes_are_matched_by_name_where_two_files_number_them_otherwise(tmp_path: Path) -> None:
    for split, names in (("train", ["cat", "dog", "emu"]), ("validation", ["cat", "emu"])):
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        rows = {"text": [f"a {name}" for name in names], "label": [*range(len(names))]}
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(tmp_path / f"{split}.parquet")
    files = {f"{split}_file": str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
    data = load_data(DataConfig(task="files", **files), seed=0)
    assert data.labels == ["cat", "dog", "emu"]
    assert data.evaluation["validation"]["label"][:] == [0, 2]
    table = read_table(files["validation_file"], {"text", "label"})
    assert given_labels(table, "label", ["dog", "emu", "cat"]) == ([2, 1], None, False)
    files = {"train_file": files["validation_file"], "validation_file": files["train_file"]}
    with pytest.raises(AFLoRAError, match=r"train.parquet, row 2: its label is dog, which is none of cat, emu"):
        load_data(DataConfig(task="files", **files), seed=0)


def test_numbers_of_two_files_are_told_with_their_files(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na,0.5 of\n")
    (tmp_path / "y.csv").write_text("text,label\na,0.5\n")
    options = {"train_file": str(tmp_path / "x.csv"), "mix": {str(tmp_path / "y.csv"): 1.0}, "hold_out": 1}
    with pytest.raises(AFLoRAError, match=r"x.csv, line 2, .* is no number, but '0.5' \(.*y.csv, line 2\) is one"):
        load_data(DataConfig(task="files", **options), seed=0)


def test_texts_of_pandas_parquet_are_mixed_with_others(tmp_path: Path) -> None:
    large = {"text": pa.array(["one", "two"], pa.large_string()), "answer": [1, 2]}
    pq.write_table(pa.table(large), tmp_path / "pandas.parquet")
    (tmp_path / "lines.jsonl").write_text('{"text": "three"}\n')
    mix = {str(tmp_path / "lines.jsonl"): 1.0}
    train, held = sft(train_file=str(tmp_path / "pandas.parquet"), mix=mix, hold_out=1)
    assert sorted([*train["text"], *held["text"]]) == ["one", "three", "two"]
    (hub := tmp_path / "hub").mkdir()
    pq.write_table(pa.table({**large, "label": pa.array([0, 1], pa.int32())}), hub / "train.parquet")
    (tmp_path / "x.csv").write_text("text,label\nthree,1\n")
    mix = {str(tmp_path / "x.csv"): 1.0}
    options = {"name": str(hub), "mix": mix, "validation_file": str(hub / "train.parquet")}
    data = load_data(DataConfig(task="files", **options), seed=0)
    assert [*zip(data.train["text"], data.train["label"], strict=True)] == [("one", 0), ("two", 1), ("three", 1)]


def test_classifiers_mix_files_too_and_errors_name_the_line_of_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,no\nb,yes\n")
    (tmp_path / "b.csv").write_text("review,label\nc,yes\nd,no\ne,no\n")
    options: dict[str, Any] = {"task": "files", "mix": {str(tmp_path / "a.csv"): 3}, "columns": {"text": "review"}}
    data = load_data(DataConfig(train_file=str(tmp_path / "b.csv"), hold_out=2, **options), seed=0)
    held = data.evaluation["validation"]["text"][:]
    assert len(held) == 2
    assert sorted(data.train["text"]) == [text for text in "aaabbbcde" if text not in held]
    (tmp_path / "a.csv").write_text("text,label\na,no\nb,\n")
    with pytest.raises(AFLoRAError, match=r"a.csv, line 3: it has nothing in column 'label'"):
        load_data(DataConfig(train_file=str(tmp_path / "b.csv"), hold_out=2, **options), seed=0)


def test_gsm8k_trains_and_is_scored(tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = {
        "preset": "llm/gsm8k",
        "data.name": hub_sets.gsm8k(tmp_path / "gsm8k", times=4),
        "model.name": make_small_language_model(tmp_path / "model"),
        "train.batch_size": 4,
        "data.max_length": 128,
        "data.max_new_tokens": 8,
        "run.dir": run,
        "run.tensorboard": False,
    }
    done = start("single", command_line(chosen))
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], len(result["evaluations"])) == (12, 3)
    assert set(result["metrics"]) == {"exact_match", "loss", "perplexity"}


def test_a_split_that_the_mix_trains_on_is_none_to_measure_with(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, n in (("train", 40), ("test", 12)):
        rows = [{"text": f"{split} {i}", "label": "ab"[i % 2]} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(task="files", name=str(folder), mix={f"{folder}::test": 2.0})
    with pytest.raises(AFLoRAError, match="has no examples for evaluation"):
        load_data(data, 0)
    plain = load_data(DataConfig(task="files", name=str(folder)), 0)
    assert len(plain.evaluation["validation"]) == 12
    for more in ({"validation_split": "test"}, {"validation_file": str(folder / "test.jsonl")}):
        mix = {f"{folder}::test": 2.0} if "validation_split" in more else {str(folder / "test.jsonl"): 1.0}
        with pytest.raises(AFLoRAError, match=r"data.mix trains on .*, on which data.validation_"):
            load_data(DataConfig(task="files", name=str(folder), mix=mix, **more), 0)
    for validation, mixed in (("test[:50%]", "test"), ("test", "train+test"), ("test[:6]", "test")):
        with pytest.raises(AFLoRAError, match=r"data.mix trains on .*, on which data.validation_"):
            load_data(
                DataConfig(
                    task="files", name=str(folder), mix={f"{folder}::{mixed}": 1.0}, validation_split=validation
                ),
                0,
            )
    apart = DataConfig(
        task="files", name=str(folder), mix={f"{folder}::test[:50%]": 1.0}, validation_split="test[50%:]"
    )
    assert len(load_data(apart, 0).evaluation["validation"]) == 6
