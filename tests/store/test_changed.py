"""What a run hangs on and its configuration does not tell: noticed when it has changed since the checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from decimal import Decimal
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from aflora_dist.store.fingerprint import of_examples, of_weights
from aflora_dist.training.run import main
from tests.runs import command_line
from tests.small_lm import make_small_language_model, write_problems


def rows(count: int = 40) -> dict[str, list[object]]:
    return {"input_ids": [[i, i + 1, i % 3] for i in range(count)], "labels": [i % 2 for i in range(count)]}


def test_every_row_and_its_place_count_and_how_they_are_kept_does_not() -> None:
    plain = datasets.Dataset.from_dict(rows())
    known = of_examples([plain])
    half = [datasets.Dataset.from_dict({k: v[at : at + 20] for k, v in rows().items()}) for at in (0, 20)]
    assert of_examples([datasets.concatenate_datasets(half)]) == known
    assert of_examples([datasets.Dataset.from_dict({k: v + v for k, v in rows().items()}).select(range(40))]) == known
    narrow = plain.cast_column("input_ids", datasets.List(datasets.Value("int32")))
    assert of_examples([narrow]) == known
    changed = []
    for row in range(40):
        one = rows()
        one["input_ids"][row] = [7, 7]
        changed.append(of_examples([datasets.Dataset.from_dict(one)]))
    moved = of_examples([plain.select([1, 0, *range(2, 40)])])
    answered = {of_examples([plain, [right]]) for right in ("an answer", Decimal("4.5"), Decimal("4.6"))}
    assert len({known, moved, *changed, *answered}) == 45


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {"large": torch.randn(300, 300), "small": torch.randn(5), "last": torch.randn(7)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_weights_are_known_by_their_content_however_they_are_cut_into_files(base: Path) -> None:
    known = of_weights(str(base), None)
    assert known is not None
    tensors = load_file(base / "model.safetensors")
    cut = base.parent / "cut"
    cut.mkdir()
    save_file({"large": tensors["large"]}, cut / "a.safetensors")
    save_file({name: tensors[name] for name in ("last", "small")}, cut / "b.safetensors")
    index = {"large": "a.safetensors", "small": "b.safetensors", "last": "b.safetensors"}
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert of_weights(str(cut), None) == known
    generator = random.Random(0)
    for name in tensors:
        other = {key: value.clone() for key, value in tensors.items()}
        places = range(other[name].numel()) if name == "large" else [generator.randrange(other[name].numel())]
        other[name].view(-1)[list(places)] += 1e-3  # as training leaves them: all of a large one
        save_file(other, base / "model.safetensors")
        assert of_weights(str(base), None) != known
    save_file({**tensors, "large": tensors["large"].view(-1)}, base / "model.safetensors")
    assert of_weights(str(base), None) != known
    assert of_weights("nobody/has-this-model", None) is None


def test_a_classifier_s_run_is_not_taken_up_on_other_texts_or_weights(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    shutil.copytree(tiny_model, model)
    texts = [f"{'good' if i % 2 else 'bad'} film,{'yes' if i % 2 else 'no'}\n" for i in range(64)]
    for name in ("train", "dev"):
        (data / f"{name}.csv").write_text("text,label\n" + "".join(texts))
    chosen = {
        "run.dir": tmp_path / "run",
        "run.save_every": 2,
        "model.name": model,
        "data.task": "files",
        "data.train_file": data / "train.csv",
        "data.validation_file": data / "dev.csv",
        "train.epochs": 1,
        "train.batch_size": 16,
    }
    arguments = [*command_line(chosen), "--freezing.initial_epochs", "0.5", "--freezing.final_epochs", "0.25"]
    assert main(arguments) == 0
    (tmp_path / "run" / "result.json").unlink()
    before = {path: path.read_bytes() for path in (data / "train.csv", data / "dev.csv", model / "model.safetensors")}

    def refused(name: str) -> None:
        assert main([*arguments, "--resume"]) == 2
        assert f"is of a run on other {name} than what was loaded now" in capsys.readouterr().err

    middle = [text if i % 4 == 0 else text.replace("film", "plot") for i, text in enumerate(texts)]
    for name, what in (("train", "training data"), ("dev", "validation data")):
        (data / f"{name}.csv").write_text("text,label\n" + "".join(middle))
        refused(what)
        (data / f"{name}.csv").write_bytes(before[data / f"{name}.csv"])
    changed = AutoModel.from_pretrained(model)
    changed.encoder.layer[1].output.dense.weight.data += 1e-3
    changed.save_pretrained(model)
    refused("base weights")
    (model / "model.safetensors").write_bytes(before[model / "model.safetensors"])
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}))
    refused("settings of the base model (config.json)")
    (model / "config.json").write_text(json.dumps({**settings, "transformers_version": "5.0.0"}))
    assert main([*arguments, "--resume"]) == 0


def test_a_language_model_s_run_is_not_taken_up_with_another_template_or_other_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = make_small_language_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 16), ("dev", 8)):
        write_problems(data / f"{name}.jsonl", count, seed=count)
    chosen = {
        "run.dir": tmp_path / "run",
        "model.name": model,
        "data.task": "sft",
        "data.train_file": data / "train.jsonl",
        "data.validation_file": data / "dev.jsonl",
        "data.max_length": 96,
        "data.max_new_tokens": 2,
        "train.epochs": 1,
        "train.batch_size": 8,
        "run.save_every": 1,
    }
    arguments = [*command_line(chosen), "--freezing.initial_epochs", "0.5", "--freezing.final_epochs", "0.5"]
    assert main(arguments) == 0
    (tmp_path / "run" / "result.json").unlink()
    written = (data / "train.jsonl").read_text()
    lines = written.splitlines()
    for number in range(1, 16):  # not the first, of which one in 16 was looked at
        row = json.loads(lines[number])
        lines[number] = json.dumps({**row, "completion": f"{row['completion']} The answer is 7."})
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    assert main([*arguments, "--resume"]) == 2
    assert "is of a run on other training data than what was loaded now" in capsys.readouterr().err
    (data / "train.jsonl").write_text(written)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' }}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    assert main([*arguments, "--resume"]) == 2
    assert "is of a run on other training data than what was loaded now" in capsys.readouterr().err
