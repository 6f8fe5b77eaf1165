"""The main job and its run directory, in one process and launched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aflora_dist.freezing import CubicSchedule
from aflora_dist.training.run import main
from tests.launch import MAIN_JOB, ROOT, launch
from tests.runs import command_line, freezes, options, start_all, weights


def read(folder: Path) -> dict[str, Any]:
    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    return {
        "config": yaml.safe_load((folder / "config.yaml").read_text()),
        "freeze_log": lines("freeze_log.jsonl"),
        "metrics": lines("metrics.jsonl"),
        "result": json.loads((folder / "result.json").read_text()),
    }


@pytest.fixture
def run(arguments: list[str], tmp_path: Path) -> dict[str, Any]:
    assert main(arguments) == 0
    return read(tmp_path / "run")


def test_the_run_directory_keeps_its_contract(run: dict[str, Any], tmp_path: Path) -> None:
    assert run["config"]["train"]["batch_size"] == 16
    assert run["config"]["freezing"]["beta1"] == 0.85  # defaults are resolved
    assert [line["step"] for line in run["metrics"]] == list(range(12))
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "trainable_params", "frozen", "samples_per_second"}
    assert all(keys <= line.keys() for line in run["metrics"])
    events = run["freeze_log"]
    for event in events:
        assert set(event["frozen"]) <= set(event["scores"])
        assert event["trainable_params"] * 2 * 4 == event["optimizer_state_bytes"]
    assert events[-1]["remaining"] == 0
    assert sum(len(event["frozen"]) for event in events) == 8
    assert all(event["step"] >= 3 for event in events)  # t_i is half an epoch
    names = {n for event in events for n in event["frozen"]}
    assert all(n.startswith("base_model.model.bert.encoder.layer.") for n in names)
    result = run["result"]
    assert (result["engine"], result["world_size"], result["steps"]) == ("single", 1, 12)
    assert result["train_seconds"] > 0
    assert 0 < result["freeze_seconds_total"] < result["train_seconds"]
    assert result["peak_memory_bytes"] > 2**20
    events_file = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/frozen", "eval/accuracy"} <= set(events_file.Tags()["scalars"])


def test_the_average_of_trainable_parameters_follows_from_the_freeze_log(run: dict[str, Any]) -> None:
    head = run["result"]["head_params"]
    at = {event["step"]: event["trainable_params"] for event in run["freeze_log"]}
    first = run["metrics"][0]["trainable_params"] - head  # nothing is frozen yet
    trained, current = [], first
    for step in range(12):
        trained.append(current)  # an update trains what had not frozen before it
        current = at.get(step, current + head) - head
    assert run["result"]["avg_trainable_params"] == pytest.approx(sum(trained) / 12)


def test_the_learning_rates_rise_and_fall_and_the_head_has_its_own(run: dict[str, Any]) -> None:
    rates = [line["lr"] for line in run["metrics"]]
    assert rates[0] == 0  # one step of warm-up: 6% of 12
    assert rates[1:] == pytest.approx([1e-2 * (11 - n) / 11 for n in range(11)])
    assert [line["head_lr"] for line in run["metrics"]] == pytest.approx([4 * rate for rate in rates])


def test_the_saved_adapter_loads_with_peft_and_reaches_the_reported_accuracy(
    run: dict[str, Any], tmp_path: Path, tiny_model: Path, reviews: Path
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [line.split(",") for line in (reviews / "dev.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        predictions = model(**batch).logits.argmax(-1).tolist()
    right = sum(p == (label == "positive") for p, (_, label) in zip(predictions, rows, strict=True))
    assert run["result"]["metrics"]["accuracy"] == pytest.approx(right / 33)
    assert right > 33 / 2


CONFIGS = {
    "cpu": ("single", 1),
    "gpu": ("single", 1),
    "ddp": ("ddp", 2),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    "zero3_offload": ("zero3", 2),
    "fsdp2": ("fsdp2", 2),
}


def test_every_launch_configuration_is_started_below() -> None:
    assert {path.stem for path in (ROOT / "launch").glob("*.yaml")} == set(CONFIGS)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CONFIGS)
def test_the_launch_configurations_give_the_results_of_one_process_on_a_cpu(
    name: str, run: dict[str, Any], arguments: list[str], tmp_path: Path
) -> None:
    launcher = ["--config_file", str(ROOT / "launch" / f"{name}.yaml"), "--mixed_precision", "no"]
    launched = [*arguments, "--run.dir", str(tmp_path / "launched"), "--train.accumulation", "2"]
    ranks = CONFIGS[name][1]
    # accelerate leaves FSDP out on CPUs, unless it takes them for GPUs
    job = MAIN_JOB if name != "fsdp2" else ("-m", "profiling.fsdp_on_cpu", MAIN_JOB[1])
    # The launcher reads each file; that it really starts processes is seen once.
    done = launch(name, ranks, *job, *launched, launcher=launcher, timeout=420, true_launch=name == "zero2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable parameters" in done.stdout
    theirs = read(tmp_path / "launched")
    assert (theirs["result"]["engine"], theirs["result"]["world_size"]) == CONFIGS[name]
    assert [(e["step"], e["frozen"]) for e in theirs["freeze_log"]] == [
        (e["step"], e["frozen"]) for e in run["freeze_log"]
    ]
    for line, expected in zip(theirs["metrics"], run["metrics"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert line["lr"] == expected["lr"]
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert theirs["result"]["metrics"] == pytest.approx(run["result"]["metrics"])  # 33 examples, each counted once
    assert theirs["result"]["avg_trainable_params"] == run["result"]["avg_trainable_params"]


@pytest.mark.distributed
def test_updates_that_overflow_move_the_one_clock(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    """fp16 from a loss scale of 2**30: the first updates are skipped. Every file counts the same steps."""
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    settings["fp16"] = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    launcher = ["--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "ds.json"), "--num_processes", "2"]
    arguments = options(tmp_path / "run", tiny_model, reviews, **{"run.save_every": 0})
    worker = str(ROOT / "tests" / "workers" / "half.py")
    done = launch("zero2", 2, worker, *arguments, launcher=[*launcher, "--num_machines", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    run = read(tmp_path / "run")
    assert run["result"]["steps"] == 24
    assert 3 <= run["result"]["skipped_updates"] == run["metrics"][-1]["skipped"] < 20
    assert [line["step"] for line in run["metrics"]] == list(range(24))
    schedule = CubicSchedule(total_steps=24, initial_steps=3, final_steps=6)
    frozen = {event["step"]: 8 - event["remaining"] for event in run["freeze_log"]}
    for line in run["metrics"]:
        t = line["step"]
        assert line["freezing_fraction"] == schedule.fraction(t)
        assert line["frozen"] == schedule.count(t, 8) == max((n for s, n in frozen.items() if s <= t), default=0)
        assert line["lr"] == pytest.approx(1e-2 * (t if t < 1 else (24 - t) / 23))  # warm-up of one step, then down


@pytest.mark.distributed
def test_fsdp_on_cpus_is_refused_and_not_taken_for_ddp(arguments: list[str]) -> None:
    launcher = ["--config_file", str(ROOT / "launch" / "fsdp2.yaml"), "--mixed_precision", "no"]
    done = launch("fsdp2", 2, *MAIN_JOB, *arguments, launcher=launcher)
    assert done.returncode == 2
    assert "FSDP was asked for, but accelerate leaves it out on CPUs" in done.stderr


@pytest.mark.parametrize("mode", ["never", "always"])
def test_never_and_always_frozen_train_without_events(mode: str, arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--adapter.freezing", mode]) == 0
    run = tmp_path / "run"
    assert not (run / "freeze_log.jsonl").exists()
    result = json.loads((run / "result.json").read_text())
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["avg_trainable_params"] == line["trainable_params"] - result["head_params"]
    assert (result["avg_trainable_params"] > 1600) == (mode == "never")


def test_real_glue_files_train_and_are_measured(glue: Path, tiny_model: Path, tmp_path: Path) -> None:
    for task, metric in (("cola", "matthews_correlation"), ("stsb", "pearson"), ("rte", "accuracy")):
        options = ["--preset", f"glue/{task}", "--model.name", str(tiny_model), "--data.path", str(glue)]
        options += ["--data.max_train_examples", "128", "--data.max_eval_examples", "50", "--data.max_length", "32"]
        options += ["--train.epochs", "1", "--freezing.initial_epochs", "0", "--freezing.final_epochs", "0.5"]
        assert main([*options, "--run.dir", str(tmp_path / task)]) == 0
        assert set(read(tmp_path / task)["result"]["metrics"]) == {metric}


@pytest.mark.distributed
def test_activation_checkpointing_of_fsdp2_changes_no_name(
    undisturbed: Callable[..., Path],
    tiny_model: Path,
    reviews: Path,
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """accelerate puts a module of its own around each layer; for PEFT's methods, too, all is saved."""
    lora = command_line({"method.name": "lora", "run.dir": tmp_path / "lora"})
    lora = [*arguments[:-4], *lora]  # the last ones are of freezing
    assert main([*lora, "--run.dir", str(tmp_path / "one")]) == 0
    with monkeypatch.context() as patch:
        patch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
        start_all("fsdp2", [options(tmp_path / "ours", tiny_model, reviews), lora])
    whole = undisturbed("single")
    assert freezes(tmp_path / "ours") == freezes(whole)
    for mine, theirs in (
        (weights(tmp_path / "ours"), weights(whole)),
        (weights(tmp_path / "lora"), weights(tmp_path / "one")),
    ):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
    saved = ["--resume", str(tmp_path / "ours" / "checkpoints" / "step_00000010")]
    assert main([*options(tmp_path / "on", tiny_model, reviews), *saved]) == 0
    assert freezes(tmp_path / "on") == freezes(whole)
