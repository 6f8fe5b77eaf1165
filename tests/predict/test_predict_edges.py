"""`aflora predict` where a file, an option or a model is odd: right, or refused in a sentence that says where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aflora_dist.cli import run as aflora
from aflora_dist.tasks.labels import given_labels
from aflora_dist.tasks.reading import read_table
from aflora_dist.training.run import main as train
from tests.predict.asked import predict, read
from tests.runs import options
from tests.small_lm import make_small_tokenizer


@pytest.mark.parametrize(
    ("names", "labels", "expected", "by_number"),
    [
        (["1.0", "2.0", "3.0"], [1, 3, "2"], [0, 2, 1], False),
        (["01", "02", "03"], [1, "02", 3], [0, 1, 2], False),
        (["1", "2"], [1, 2.0], [0, 1], False),
        (["negative", "positive"], [1, "negative"], [1, 0], True),
        (["1 star", "2 stars"], [1, 0], [1, 0], True),
        (["no", "2"], [1, 2, "no"], [None, 1, 0], False),
    ],
)
def test_labels_are_names_then_values_and_numbers_of_classes_last(
    names: list[str], labels: list[Any], expected: list[int | None], by_number: bool, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    found, _, numbered = given_labels(read_table(str(file), {"text", "label"}), "label", names)
    assert (found, numbered) == (expected, by_number)


@pytest.mark.parametrize("kind", ["classifier", "talker"])
def test_an_adapter_that_diverged_labels_nothing(
    kind: str, reviews: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Path = request.getfixturevalue(kind)
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("aflora.B"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    file = reviews / "dev.csv" if kind == "classifier" else run.parent / "dev.jsonl"
    assert predict(tmp_path / "run", file, "--out", tmp_path / f"out{file.suffix}") == 2
    assert f"{name} holds values that are not finite numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.text_columns", "[text,label,n]"], "names one column, or two different ones"),
        (["--data.text_columns", "[]"], "names one column, or two different ones"),
        (["--data.text_columns", "[text,text]"], "names one column, or two different ones"),
        (["--data.max_length", "2"], "data.max_length=2 leaves nothing of the texts"),
        (["--data.columns", '{"text": "reveiw"}'], "has no column 'reveiw'"),
        (["--data.columns.text", "reveiw"], "has no column 'reveiw'"),
        (["--data", '{"columns": {"text": "reveiw"}}'], "has no column 'reveiw'"),
        (["--data.label_column", "stars"], "has no column 'stars'"),
        (["--data={label_column: stars}"], "has no column 'stars'"),
        (["--data.max_new_tokens", "3"], "data.max_new_tokens is for data.task=sft"),
        (["--run.overwrite", "true"], "does not read run.overwrite"),
        (["--resume"], "does not read run.resume"),
        (["--preset", "glue/rte"], "does not read preset"),
        (["--adapter", '{"r": 9}'], "does not read adapter.r"),
        (["--data.task", "sst2"], "does not read data.task"),
        (["--config", "rows.yaml"], "does not read config"),
    ],
)
def test_options_are_checked_as_in_training_and_read_however_they_are_said(
    words: list[str],
    expected: str,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label,n\ngood film,positive,1\n")
    (tmp_path / "rows.yaml").write_text("data:\n  max_length: 9\n")
    assert predict(classifier, tmp_path / "rows.csv", *words) == 2
    assert expected in capsys.readouterr().err


def test_a_column_of_text_that_is_named_is_read_in_glue_s_runs_too(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for split, rows in (("train", 16), ("dev", 4)):
        lines = [f"{'good' if i % 2 else 'bad'} film {i}\t{i % 2}" for i in range(rows)]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    more = {"data.task": "sst2", "data.path": tmp_path / "glue", "train.epochs": 2, "train.batch_size": 8}
    line = [word for word in options(tmp_path / "run", tiny_model, tmp_path, **more) if "{" not in word]
    assert train(_without(line, "--data.train_file", "--data.validation_file")) == 0
    (tmp_path / "rows.csv").write_text("sentence,text\ngood film,bad plot\n")
    (tmp_path / "turned.csv").write_text("sentence\nbad plot\n")
    assert predict(tmp_path / "run", tmp_path / "rows.csv", "--data", '{"text_columns": ["text"]}') == 0
    assert predict(tmp_path / "run", tmp_path / "turned.csv") == 0
    (tmp_path / "glue.tsv").write_text('sentence\tlabel\n"good" film\t1\n"bad\t0\n')
    assert predict(tmp_path / "run", tmp_path / "glue.tsv") == 0  # without quoting, as GLUE's files are
    assert "(2 rows with a label in column 'label')" in capsys.readouterr().out
    found = [line.split("\t")[:2] for line in (tmp_path / "glue.predicted.tsv").read_text().splitlines()]
    assert found == [["sentence", "label"], ['"good" film', "1"], ['"bad', "0"]]
    (named,), (alone,) = (read(tmp_path / f"{name}.predicted.csv") for name in ("rows", "turned"))
    assert [named[key] for key in named if "probability" in key] == [alone[key] for key in alone if "prob" in key]


def _without(line: list[str], *names: str) -> list[str]:
    return [word for i, word in enumerate(line) if word not in names and (i == 0 or line[i - 1] not in names)]


def test_prompts_under_another_name_are_told_of(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.csv").write_text("question\nAda has 2\n")
    assert predict(talker, tmp_path / "asked.csv") == 2
    assert "question" in capsys.readouterr().err
    assert predict(talker, tmp_path / "asked.csv", "--data.label_column", "question") == 2
    assert "A model that says an answer does not read data.label_column" in capsys.readouterr().err
    assert predict(talker, tmp_path / "asked.csv", "--data.columns.prompt", "question") == 0


def test_a_chat_is_answered_whose_template_does_not_tell_what_was_learned(talker: Path, tmp_path: Path) -> None:
    """DeepSeek R1's asks for thoughts, which earlier turns are written without."""
    adapter = shutil.copytree(talker / "adapter", tmp_path / "adapter")
    make_small_tokenizer(
        "{% for m in messages %}{{ 'Response : ' if m.role == 'assistant' else 'Instruction : ' }}"
        "{{ m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'Response : # ' }}{% endif %}"
    ).save_pretrained(adapter)
    said = [("user", "Ada has 3"), ("assistant", "books"), ("user", "how many ?")]
    (file := tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}) + "\n"
    )
    assert predict(adapter, file, "--out", tmp_path / "out.jsonl", "--data.max_new_tokens", "4") == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()).keys() == {"messages", "prediction"}


def test_an_answer_without_a_number_is_told_of(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "1 + 2", "answer": "none"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict(talker, tmp_path / "asked.jsonl") == 0
    assert "line 2: the answer 'none' has no number, so nothing is compared" in capsys.readouterr().out


def test_a_file_of_the_user_s_is_not_taken_for_a_part_of_a_prediction(
    classifier: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / ".out.csv.partial"
    notes.write_text("my own notes\nand more\n")
    assert predict(classifier, reviews / "dev.csv", "--out", tmp_path / "out.csv") == 2
    assert "holds something else than a part of a prediction" in capsys.readouterr().err
    assert notes.read_text() == "my own notes\nand more\n"


def test_names_that_are_too_long_are_refused(
    classifier: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([classifier, tmp_path / ("x" * 300 + ".csv")], ["y" * 300, reviews / "dev.csv"]):
        assert predict(*words) == 2
        assert "its name is too long" in capsys.readouterr().err


def test_a_tokenizer_s_code_runs_where_the_command_line_says_so_and_nobody_is_asked(
    classifier: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    run = shutil.copytree(classifier, tmp_path / "run")
    (run / "adapter" / "own.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    told = json.loads((tiny_model / "tokenizer_config.json").read_text())
    told |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps(told))
    shutil.copyfile(tiny_model / "tokenizer.json", run / "adapter" / "tokenizer.json")
    (tmp_path / "rows.csv").write_text("text\ngood film\n")
    assert predict(run, tmp_path / "rows.csv") == 2
    assert not (tmp_path / "RAN").exists()
    assert "--model.trust_remote_code true" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked for"))
    assert predict(run, tmp_path / "rows.csv", "--model.trust_remote_code", "true") == 0
    assert (tmp_path / "RAN").exists()


def test_a_base_model_that_is_named_by_a_path_is_the_one_of_then(
    classifier: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another folder of that name may lie where the command is given: the run knows the weights of its own."""
    run = shutil.copytree(classifier, tmp_path / "run")
    for file in (run / "config.yaml", run / "adapter" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(tiny_model), "base"))
    (tmp_path / "rows.csv").write_text("text\ngood film\n")
    monkeypatch.chdir(tmp_path)

    def said(*more: Any, status: int = 2) -> str:
        assert predict("run", "rows.csv", "--overwrite", *more) == status
        return "".join(capsys.readouterr())

    assert "If base was a folder, name where it is now: --model.name FOLDER" in said()
    assert "note" not in said("--model.name", tiny_model, status=0)
    base = shutil.copytree(tiny_model, tmp_path / "base")
    assert "note" not in said(status=0)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    assert "base has other weights than the base model that the adapter in run/adapter was trained on" in said()
    assert aflora(["merge", "run", "merged"]) == 2
    assert "base has other weights" in capsys.readouterr().err
    (run / "result.json").unlink()
    assert f"by a relative path, base, and {base} was taken" in said(status=0)
