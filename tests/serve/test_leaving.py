"""What a run leaves behind for programs that do not know this package: lora/, and what labels are called."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from aflora_dist.training.run import main as train
from tests.runs import options
from tests.small import WORDS
from tests.test_export import aflora, refused

NAMES = ["bad film", "fine", "great"]
# argv is a folder to load a pipeline from, or base and adapter. Never imports aflora_dist.
ASKED = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
base, adapter = sys.argv[1:]
if adapter == "-":
    model = AutoModelForSequenceClassification.from_pretrained(base)
else:
    from peft import PeftModel
    labels = json.load(open(adapter + "/adapter_config.json"))["auto_mapping"]["id2label"]
    labels = {int(number): name for number, name in labels.items()}
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=labels)
    model = PeftModel.from_pretrained(model, adapter)
model.eval()
with torch.no_grad():
    logits = model(torch.arange(1, 13).view(2, 6)).logits
ask = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(base), top_k=None)
names = {entry["label"] for entry in ask(["good film"])[0]}
assert not [name for name in sys.modules if name.startswith("aflora")], "this process must not know the package"
print(json.dumps([logits.tolist(), sorted(names)]))
"""


def write_moods(path: Path, rows: int, names: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{WORDS[row % 6]} {WORDS[6 + row % 8]}", names[row % 6 // 2]] for row in range(rows))
    return path


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> the directory of a run on three classes, which is made once."""
    folder = tmp_path_factory.mktemp("trained")
    write_moods(folder / "train.csv", 60, NAMES)
    shutil.copyfile(folder / "train.csv", folder / "dev.csv")

    def run(method: str) -> Path:
        if not (folder / method).exists():
            more = {"method.name": method, "train.learning_rate": 0.05, "train.head_learning_rate": 0.05}
            line = options(folder / method, tiny_model, folder, **more, **{"train.epochs": 2})
            if method != "aflora":  # freezing.initial_epochs and freezing.final_epochs, with their values
                line = (
                    line[: line.index("--freezing.initial_epochs")] + line[line.index("--freezing.final_epochs") + 2 :]
                )
            assert train(line) == 0
        return folder / method

    return run


def elsewhere(base: Path, adapter: Path | str, tmp_path: Path) -> tuple[torch.Tensor, list[str]]:
    command = [sys.executable, "-c", ASKED, str(base), str(adapter)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    logits, names = json.loads(done.stdout.splitlines()[-1])
    return torch.tensor(logits), names


def test_stock_libraries_compute_the_same_and_know_what_labels_are_called(
    trained: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    run = trained("aflora")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, run / "adapter").eval()(torch.arange(1, 13).view(2, 6)).logits
    assert aflora("merge", run, tmp_path / "merged") == 0
    for place in ((tmp_path / "merged", "-"), (tiny_model, run / "lora")):
        found, names = elsewhere(*place, tmp_path)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert names == NAMES
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())["auto_mapping"]
    assert config["id2label"] == {"0": "bad film", "1": "fine", "2": "great"}
    assert config["label2id"] == {"bad film": 0, "fine": 1, "great": 2}
    assert json.loads((run / "result.json").read_text())["labels"] == NAMES
    assert "Labels: 0 `bad film`, 1 `fine`, 2 `great`." in (run / "lora" / "README.md").read_text()


def test_an_adapter_of_peft_s_own_is_left_as_it_is(
    trained: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    run = trained("lora")
    names = {path.name for path in (run / "lora").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    for name in names - {"README.md"}:
        assert (run / "lora" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    assert "fine-tuned with LORA" in (run / "lora" / "README.md").read_text()
    assert elsewhere(tiny_model, run / "lora", tmp_path)[1] == NAMES


def test_what_is_no_adapter_or_no_model_is_called_what_it_is(
    trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, aflora_run = trained("full"), trained("aflora")
    for command in ("merge", "to-lora"):
        for folder in (full, full / "adapter"):
            said = refused(capsys, command, folder, tmp_path / "out")
            assert f"{full / 'adapter'} is a whole model, and no adapter: nothing is to be merged" in said
    wanted = {full: f"name {full / 'adapter'}"}
    wanted |= {folder: f"`aflora merge {folder} OUT`" for folder in (aflora_run, aflora_run / "adapter")}
    for folder, expected in wanted.items():
        words = ["--run.dir", tmp_path / "run", "--data.task", "sft", "--data.name", "demo", "--model.name", folder]
        assert expected in refused(capsys, "train", *words)


def test_full_fine_tuning_names_labels_and_leaves_no_adapter(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained("full")
    assert not (run / "lora").exists()
    assert json.loads((run / "adapter" / "config.json").read_text())["label2id"]["great"] == 2


def test_a_finished_run_gets_its_lora_again_where_it_is_missing(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("aflora"), run)
    weights = (run / "lora" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "lora")
    assert train([str(run / "config.yaml"), "--run.dir", str(run), "--resume"]) == 0
    assert (run / "lora" / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_is_not_continued_with_other_labels(
    trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("aflora"), run)
    (run / "result.json").unlink()
    (checkpoint,) = sorted((run / "checkpoints").iterdir())[:1]
    for split in ("train", "dev"):
        write_moods(tmp_path / f"{split}.csv", 60, ["bad film", "fine", "superb"])  # the same numbers
    before = sorted(path.name for path in run.iterdir())
    data = ["--data.train_file", str(tmp_path / "train.csv"), "--data.validation_file", str(tmp_path / "dev.csv")]
    assert train([str(run / "config.yaml"), *data, "--run.dir", str(run), "--resume", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert 'labels are ["bad film", "fine", "great"]' in said
    assert 'loaded now are ["bad film", "fine", "superb"]' in said
    assert sorted(path.name for path in run.iterdir()) == before
