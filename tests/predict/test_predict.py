"""`aflora predict`: the numbers of the training's evaluation, row for row in a file, on every engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, RobertaConfig, RobertaModel

from aflora_dist.predict import asking
from aflora_dist.predict.trained import find_trained
from aflora_dist.training.run import main as train
from tests.launch import launch_series
from tests.predict.asked import LEARNS, predict, read
from tests.runs import options


def result(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


def test_a_file_is_labelled_as_the_evaluation_did(
    classifier: Path, tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    assert predict(classifier, reviews / "dev.csv", "--out", out) == 0
    said = capsys.readouterr().out
    given, found = read(reviews / "dev.csv"), read(out)
    assert [{name: row[name] for name in ("text", "label")} for row in found] == given
    assert list(found[0]) == ["text", "label", "prediction", "probability_negative", "probability_positive"]
    labels, predictions = ([row[name] for row in found] for name in ("label", "prediction"))
    metrics = result(classifier)
    assert accuracy_score(labels, predictions) == metrics["accuracy"] > 0.9
    assert f1_score(labels, predictions, pos_label="positive") == metrics["f1"]
    assert f"accuracy {metrics['accuracy']:.4f}  f1 {metrics['f1']:.4f}  (33 rows with a label" in said

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model, tokenizer = (
        PeftModel.from_pretrained(base, classifier / "lora").eval(),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    for row in found:  # alone, and so without padding
        with torch.no_grad():
            chances = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        names = ("probability_negative", "probability_positive")
        np.testing.assert_allclose([float(row[name]) for name in names], chances, rtol=1e-4)
        assert row["prediction"] == ("positive" if chances[1] > chances[0] else "negative")


def test_numbers_are_those_of_the_evaluation(
    regression: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(regression, regression.parent / "dev.csv", "--out", tmp_path / "out.csv") == 0
    found = read(tmp_path / "out.csv")
    predictions, labels = ([float(row[name]) for row in found] for name in ("prediction", "label"))
    exact = np.asarray(predictions, dtype=np.float32).astype(np.float64)
    assert pearsonr(labels, exact).statistic == result(regression)["pearson"]
    assert f"pearson {result(regression)['pearson']:.4f}" in capsys.readouterr().out


def test_answers_are_those_of_the_evaluation(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    assert predict(talker, talker.parent / "dev.jsonl", "--out", out) == 0
    assert f"exact_match {result(talker)['exact_match']:.4f}  (13 rows" in capsys.readouterr().out
    given = [json.loads(line) for line in (talker.parent / "dev.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{name: row[name] for name in given[0]} for row in found] == given
    assert any(row["prediction"] for row in found)
    prompts = tmp_path / "prompts.csv"  # nothing but what is asked
    prompts.write_text("prompt\n" + "".join(f"{row['prompt']}\n" for row in given))
    assert predict(talker, prompts, "--prefix", "a_") == 0
    again = read(tmp_path / "prompts.predicted.csv")
    assert [row["a_prediction"] for row in again] == [row["prediction"] for row in found]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero3", "ddp", "zero2", "fsdp2"])
def test_several_ranks_predict_the_same(
    engine: str, classifier: Path, regression: Path, talker: Path, reviews: Path, tmp_path: Path
) -> None:
    asked = {classifier: reviews / "dev.csv", regression: regression.parent / "dev.csv"}
    if engine != "fsdp2":  # whose worker wraps BERT's layers
        asked[talker] = talker.parent / "dev.jsonl"
    worker = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else []
    lines = []
    for place, (run, file) in enumerate(asked.items()):
        assert predict(run, file, "--out", tmp_path / f"alone_{place}{file.suffix}") == 0
        out = tmp_path / f"together_{place}{file.suffix}"
        lines.append([*worker, "aflora_dist.predict.command", str(run), str(file), "--out", str(out)])
    for place, ((run, file), said) in enumerate(zip(asked.items(), launch_series(engine, 2, lines), strict=True)):
        name, value = next(iter(result(run).items()))
        assert f"{name} {value:.4f}" in said
        alone, together = (tmp_path / f"{how}_{place}{file.suffix}" for how in ("alone", "together"))
        if file.suffix == ".jsonl":
            assert alone.read_bytes() == together.read_bytes()
            continue
        for mine, theirs in zip(read(alone), read(together), strict=True):
            for column in mine:
                if column.startswith("probability") or (column == "prediction" and run == regression):
                    np.testing.assert_allclose(float(mine[column]), float(theirs[column]), rtol=1e-5, atol=1e-6)
                else:
                    assert mine[column] == theirs[column]


@pytest.mark.parametrize("method", ["lora", "full", "vera"])
def test_other_methods_predict_as_they_were_measured(
    method: str, tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = options(tmp_path / "run", tiny_model, reviews, **(LEARNS | {"method.name": method}))
    line = line[: line.index("--freezing.initial_epochs")] + line[line.index("--freezing.final_epochs") + 2 :]
    assert train(line) == 0
    assert predict(tmp_path / "run", reviews / "dev.csv", "--out", tmp_path / "out.csv") == 0
    found = read(tmp_path / "out.csv")
    metrics = result(tmp_path / "run")
    assert accuracy_score([r["label"] for r in found], [r["prediction"] for r in found]) == metrics["accuracy"]
    assert {r["prediction"] for r in found} <= {"negative", "positive"}


@pytest.mark.parametrize("method", ["aflora", "lora"])
def test_what_trained_in_float32_over_a_model_in_half_precision_is_not_rounded(
    method: str, tiny_model: Path, regression: Path, tmp_path: Path
) -> None:
    """PEFT loads a head in the dtype of the base model's."""
    chosen = {"method.name": method, "model.dtype": "bfloat16", "train.epochs": 2, "train.learning_rate": 0.01}
    line = options(tmp_path / "run", tiny_model, regression.parent, **chosen)
    line = line[: line.index("--freezing.initial_epochs")] + line[line.index("--freezing.final_epochs") + 2 :]
    assert train(line) == 0
    assert predict(tmp_path / "run", regression.parent / "dev.csv", "--out", tmp_path / "out.csv") == 0
    predictions, labels = ([float(row[name]) for row in read(tmp_path / "out.csv")] for name in ("prediction", "label"))
    exact = np.asarray(predictions, dtype=np.float32).astype(np.float64)
    assert pearsonr(labels, exact).statistic == result(tmp_path / "run")["pearson"]


def test_what_was_done_is_not_done_again(
    classifier: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking._Labels, "part", 10)
    assert predict(classifier, reviews / "dev.csv", "--out", tmp_path / "undisturbed.csv") == 0
    original: Callable[..., Any] = asking._Labels.predict
    asked: list[int] = []
    interrupted: list[int] = []

    def fails(self: Any, start: int, stop: int, done: Any) -> Any:
        if start == 20 and not interrupted:
            interrupted.append(start)
            raise KeyboardInterrupt
        asked.append(start)
        return original(self, start, stop, done)

    monkeypatch.setattr(asking._Labels, "predict", fails)
    out = tmp_path / "out.csv"
    assert predict(classifier, reviews / "dev.csv", "--out", out) == 130
    assert not out.exists()
    assert predict(classifier, reviews / "dev.csv", "--out", out, "--prefix", "other_") == 2
    assert "a part of another prediction" in capsys.readouterr().err
    partial = tmp_path / ".out.csv.partial"
    partial.write_text(partial.read_text() + '[["posit')  # as a process leaves it that is ended while it writes
    assert predict(classifier, reviews / "dev.csv", "--out", out) == 0
    assert "Going on after row 20" in capsys.readouterr().out
    assert asked == [0, 10, 20, 30]
    assert out.read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()
    assert not list(tmp_path.glob(".out*"))


def test_a_part_that_another_base_or_another_tokenizer_predicted_is_not_gone_on_with(
    classifier: Path,
    tiny_model: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(asking._Labels, "part", 10)
    original: Callable[..., Any] = asking._Labels.predict

    def stops(self: Any, start: int, stop: int, done: Any) -> Any:
        if start:
            raise KeyboardInterrupt
        return original(self, start, stop, done)

    def started() -> int:
        return predict(classifier, reviews / "dev.csv", "--out", tmp_path / "out.csv", "--model.name", base)

    base = shutil.copytree(tiny_model, tmp_path / "base")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        with monkeypatch.context() as patched:
            patched.setattr(asking._Labels, "predict", stops)
            assert started() == 130
        if name == "model.safetensors":
            tensors = load_file(base / name)
            tensors["encoder.layer.0.attention.self.query.weight"] += 1
            save_file(tensors, base / name, {"format": "pt"})
        else:
            old, new = {"config.json": ('"gelu"', '"relu"'), "tokenizer.json": ('"good"', '"goods"')}[name]
            text = (base / name).read_text()
            assert old in text
            (base / name).write_text(text.replace(old, new))
        assert started() == 2
        assert "a part of another prediction" in capsys.readouterr().err
        (tmp_path / ".out.csv.partial").unlink()


def test_what_cannot_be_predicted_is_refused_before_the_model_is_loaded(
    classifier: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aflora_dist.predict.trained.load_trained", lambda *_: pytest.fail("the model was loaded"))
    file = tmp_path / "file.csv"

    def refused(content: str, *more: Any) -> str:
        file.write_text(content)
        assert predict(classifier, file, *more) == 2
        return capsys.readouterr().err

    assert "file.csv is empty" in refused("text,label\n")
    said = refused("review,stars\ngood film,5\n")
    assert "no column 'text'; its columns are: review, stars." in said
    assert "--data.text_columns" in said
    assert "line 3: 1 fields, expected 2" in refused("text,stars\ngood film,5\nbad\n")
    assert "has a column 'prediction' already" in refused("text,prediction\ngood film,5\n")
    assert "is the file that is read" in refused("text\ngood\n", "--out", file, "--overwrite")
    there = tmp_path / "there.csv"
    there.write_text("mine\n")
    assert "is there already" in refused("text\ngood\n", "--out", there)
    assert there.read_text() == "mine\n"
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere.csv")
    assert "is there already" in refused("text\ngood\n", "--out", tmp_path / "link.csv")
    for folder in (".", "", "/", tmp_path):
        assert predict(classifier, folder) == 2
        assert "is a folder. Name the file" in capsys.readouterr().err
    assert "what kind of file" in refused("text\ngood\n", "--out", tmp_path / "out.xlsx")
    assert "There is no option --text" in refused("text\ngood\n", "--text", "review")
    assert predict(tmp_path, file) == 2
    assert "neither a run's directory" in capsys.readouterr().err


def test_labels_that_the_training_did_not_know_are_kept_and_said(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.csv"
    file.write_text("text,label\ngood film,positive\nbad film,\npoor plot,meh\n")
    assert predict(classifier, file) == 0
    assert "line 4: the label 'meh' is none of negative, positive" in capsys.readouterr().out
    assert [row["label"] for row in read(tmp_path / "file.predicted.csv")] == ["positive", "", "meh"]
    file.write_text("text,label\ngood film,positive\nbad film,\npoor plot,negative\n")
    assert predict(classifier, file, "--overwrite") == 0
    assert "(2 rows with a label in column 'label')" in capsys.readouterr().out


def save_lora(base: Path, folder: Path, whole: list[str] | None, labels: int) -> Path:
    """What PEFT itself writes."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    adapter = LoraConfig(TaskType.SEQ_CLS, target_modules=["query"], modules_to_save=whole)
    get_peft_model(model, adapter).save_pretrained(folder)
    return folder


def test_no_layer_is_random(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(model: Path) -> str:
        assert predict(model, reviews / "dev.csv", "--out", tmp_path / "out.csv") == 2
        return capsys.readouterr().err

    base = tmp_path / "base"  # has no pooler, as DeBERTaV3
    BertModel.from_pretrained(tiny_model, add_pooling_layer=False).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    error = said(save_lora(base, tmp_path / "no_pooler", None, 3))
    assert f"nor its base model {base} has" in error
    assert "the weights of bert.pooler.dense, which" in error
    whole = save_lora(base, tmp_path / "whole", ["pooler"], 3)
    assert predict(whole, reviews / "dev.csv", "--out", tmp_path / "out.csv") == 0
    assert set(read(tmp_path / "out.csv")[0]) >= {f"probability_LABEL_{number}" for number in range(3)}
    (tmp_path / "out.csv").unlink()
    weights = whole / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(weights).items() if "classifier" not in key}, weights)
    assert "the weights of classifier, which" in said(whole)

    merged = tmp_path / "merged"
    AutoModelForSequenceClassification.from_pretrained(tiny_model).save_pretrained(merged)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(merged)
    weights = merged / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "classifier.bias"}, weights, {"format": "pt"})
    assert "lacks weights of classifier" in said(merged)


def test_a_head_of_two_layers_may_have_more_classes_than_hidden_units(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    RobertaModel(RobertaConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "base")
    for count in (3, 8, 20):
        trained = find_trained(str(save_lora(tmp_path / "base", tmp_path / str(count), None, count)), [])
        assert trained.labels == [f"LABEL_{number}" for number in range(count)]


def test_class_names_that_the_adapter_lacks_are_the_base_model_s(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model.config.id2label = {0: "negative", 1: "positive"}
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    adapter = save_lora(tmp_path / "base", tmp_path / "adapter", ["pooler"], 2)
    assert predict(adapter, reviews / "dev.csv", "--out", tmp_path / "out.csv") == 0
    assert {"probability_negative", "probability_positive"} < set(read(tmp_path / "out.csv")[0])
    assert "rows with a label in column 'label'" in capsys.readouterr().out

    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "base")
    for of_several in (tmp_path / "base", adapter):
        assert predict(of_several, reviews / "dev.csv", "--out", tmp_path / "several.csv") == 2
        assert "gives a text any number of labels" in capsys.readouterr().err
    assert not (tmp_path / "several.csv").exists()


def test_tokens_of_the_adapter_s_own_take_positions(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    prompts = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    prompts.save_pretrained(tmp_path / "prompts")
    positions = model.config.max_position_embeddings
    words = ["--out", tmp_path / "out.csv", "--data.max_length"]
    assert predict(tmp_path / "prompts", reviews / "dev.csv", *words, positions) == 2
    assert f"is more than the {positions - 4} positions" in capsys.readouterr().err
    assert predict(tmp_path / "prompts", reviews / "dev.csv", *words, positions - 4) == 0
