"""Every script in examples/ runs, at its smallest size, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import aflora_dist  # noqa: F401  # PEFT knows its adapters
from tests.launch import ROOT, launch
from tests.ranks import ENVIRONMENT
from tests.runs import command_line
from tests.small_lm import make_small_language_model

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, engine: str = "single", ranks: int = 1) -> str:
    """As who copies the command: nothing in the environment says that the machine has no GPU."""
    with mock.patch("tests.launch.environment_for", return_value={**os.environ, **ENVIRONMENT}):
        done = launch(engine, ranks, str(EXAMPLES / script), *map(str, arguments))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trained_vectors(base: Path, adapter: Path) -> int:
    """How many s_b of a saved adapter are no longer 0, where they started."""
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), adapter)
    return sum(bool(p.any()) for name, p in model.named_parameters() if ".s_b" in name)


def test_each_script_is_run_below() -> None:
    here = Path(__file__).read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"small.py"}
    assert scripts == set(re.findall(r'run\(\s*"(\w+\.py)"', here))


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("zero3", 2)])
def test_an_own_loop(engine: str, ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    small = ["--model", tiny_model, "--examples", 64, "--batch", 4, "--out", tmp_path]
    said = run("own_loop.py", *small, engine=engine, ranks=ranks)
    updates = 64 // 4 // ranks
    last = updates - updates // 2  # T - t_f: from there on all are frozen
    assert re.findall(r"step (\d+): 0 matrices still train", said) == [str(last)]
    assert re.search(r"accuracy 0\.\d{3}, [2-8] freezes", said)
    assert trained_vectors(tiny_model, tmp_path) == 12


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("what", "engine", "ranks"), [("lora", "single", 1), ("full", "zero2", 2), ("pattern", "ddp", 2)]
)
def test_anything_freezes(what: str, engine: str, ranks: int, tiny_model: Path) -> None:
    small = [what, "--model", tiny_model, "--examples", 64, "--batch", 4]
    said = run("freeze_anything.py", *small, engine=engine, ranks=ranks)
    assert re.search(r"^\d+ parameters froze; of what may freeze 0 still train", said, re.MULTILINE)
    blocks = [int(block) for block in re.findall(r"backward ends at block (\d)", said)]
    assert blocks[-1] == (0 if what == "pattern" else 2)


@pytest.mark.distributed
def test_trainer(tiny_model: Path, tmp_path: Path) -> None:
    small = ["--model", tiny_model, "--examples", 64, "--batch", 4, "--out", tmp_path]
    said = run("with_trainer.py", *small, engine="zero2", ranks=2)
    assert re.search(r"accuracy [01]\.\d{3}, [2-8] freezes", said)
    assert trained_vectors(tiny_model, tmp_path / "adapter") == 12
    assert (tmp_path / "checkpoint-8" / "aflora").is_dir()


def test_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model = make_small_language_model(tmp_path / "model")
    small = ["--model", model, "--examples", 32, "--batch", 4, "--save-every", 4, "--out", tmp_path / "out"]
    assert re.search(r"^[2-9] freezes", run("with_trl.py", *small), re.MULTILINE)
    adapter = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    kept = adapter.read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    run("with_trl.py", *small)  # as after a preemption
    assert adapter.read_bytes() == kept
    assert json.loads((adapter.parent / "adapter_config.json").read_text())["peft_type"] == "AFLORA"


def test_the_main_job_and_what_others_make_of_its_adapter(tiny_model: Path, tmp_path: Path) -> None:
    chosen = {"model.name": tiny_model, "data.max_train_examples": 128, "data.max_eval_examples": 32}
    chosen |= {"train.batch_size": 16, "run.dir": tmp_path / "run", "run.tensorboard": False}
    said = run("main_job.py", *command_line(chosen))
    frozen = re.findall(r"[\w.]+\.[AB]\b", said)
    assert len(set(frozen)) == 8  # two layers, up and down, A and B
    said = run("export_and_serve.py", tmp_path / "run", "--out", tmp_path / "exported")
    assert "AFLoRA, LoRA and the merged model say the same" in said
    assert len(re.findall(r"^(?:positive|negative) \(0\.\d\d\): ", said, re.MULTILINE)) == 2


def test_several_adapters(tiny_model: Path) -> None:
    said = run("several_adapters.py", "--model", tiny_model, "--steps", 8)
    assert re.findall(r"^(\w+): 8 matrices froze", said, re.MULTILINE) == ["praise", "long"]
    assert len(re.findall(r"^(?:praise|long): [01]  ", said, re.MULTILINE)) == 4
