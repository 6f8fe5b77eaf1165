"""Tokens a second, and FLOPs of a token, against what was counted otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from aflora_dist.adapter import AFLoRAConfig
from aflora_dist.names import is_head
from aflora_dist.tasks.classification import Classification
from aflora_dist.tasks.sft import LanguageModelling
from aflora_dist.training import build
from aflora_dist.training.run import main
from aflora_dist.watch import log
from aflora_dist.watch.peaks import peak_flops
from aflora_dist.watch.rates import flops_per_token, peak
from tests.launch import ROOT
from tests.runs import command_line, lines
from tests.small_lm import make_small_language_model, write_problems


def count_tokens(task: type, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every micro-batch that this task's loss is asked for, by their masks."""
    seen: list[int] = []
    loss = task.loss

    def counted(self: Any, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(int(batch["attention_mask"].sum()))
        return loss(self, model, batch)

    monkeypatch.setattr(task, "loss", counted)
    return seen


def check(run: Path, seen: list[int]) -> None:
    """The lines' and the result's rates come to the tokens that were counted."""
    metrics, result = lines(run, "metrics.jsonl"), json.loads((run / "result.json").read_text())
    assert sum(m["tokens_per_second"] * m["step_seconds"] for m in metrics) == pytest.approx(sum(seen))
    assert result["tokens_per_second"] * result["train_seconds"] == pytest.approx(sum(seen))
    assert "mfu" not in result
    assert not any("mfu" in line for line in metrics)


def test_a_classifiers_tokens_a_second_leave_padding_out_and_survive_a_restart(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_tokens(Classification, monkeypatch)
    more = ["--run.trackers", "[]", "--run.save_every", "4", "--run.keep", "9", "--data.pad_to_max_length", "true"]
    assert main([*arguments, *more, "--data.max_length", "16"]) == 0
    check(tmp_path / "run", seen)
    first = len(seen)
    resume = ["--resume", str(tmp_path / "run" / "checkpoints" / "step_00000008")]
    assert main([*arguments, *more, "--data.max_length", "16", *resume]) == 0
    again = len(seen) - first
    assert seen[first:] == seen[first - again : first]
    check(tmp_path / "run", seen[:first])


def test_a_language_models_tokens_a_second_leave_padding_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_tokens(LanguageModelling, monkeypatch)
    model = make_small_language_model(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", 20, seed=0)
    chosen = {
        "run.dir": tmp_path / "run",
        "run.log_every": 1,
        "run.trackers": "[]",
        "model.name": model,
        "data.task": "sft",
        "data.train_file": tmp_path / "train.jsonl",
        "data.hold_out": 4,
        "train.epochs": 1,
        "train.batch_size": 8,
        "data.max_length": 96,
        "data.max_new_tokens": 2,
    }
    assert main(command_line(chosen)) == 0
    check(tmp_path / "run", seen)


def test_the_share_of_the_peak_is_where_the_peak_is_known(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "peak", lambda accelerator, model: 1e9)
    monkeypatch.setattr(build, "flops_per_token", lambda model, is_head: 500)
    assert main([*arguments, "--run.trackers", "[]"]) == 0
    records = [*lines(tmp_path / "run", "metrics.jsonl"), json.loads((tmp_path / "run" / "result.json").read_text())]
    assert [record["mfu"] for record in records] == [pytest.approx(r["tokens_per_second"] * 5e-7) for r in records]


@pytest.mark.parametrize(
    ("precision", "held", "fast", "expected"),
    [
        ("bf16", torch.float32, False, 4 * 989.5e12),
        ("no", torch.bfloat16, False, 4 * 989.5e12),
        ("no", torch.float32, False, 4 * 67e12),
        ("no", torch.float32, True, 4 * 494.5e12),
        ("fp8", torch.float32, False, None),
    ],
)
def test_the_peak_is_that_of_all_devices_in_what_they_multiply(
    precision: str, held: torch.dtype, fast: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), mixed_precision=precision, num_processes=4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high" if fast else "highest")
    model = torch.nn.Linear(2, 2, dtype=held).requires_grad_(False)
    assert peak(accelerator, model) == expected
    accelerator.device = torch.device("cpu")
    assert peak(accelerator, model) is None


@pytest.mark.parametrize("method", ["aflora", "lora", "full", "frozen"])
def test_flops_of_a_token_are_those_that_torch_counts(method: str) -> None:
    """But for attention's own (L / 4d = 1.6% here), and the gradient of the first layer's input, which nobody needs."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512
    )
    model: Any = BertForSequenceClassification(config)
    if method == "aflora":
        model = get_peft_model(model, AFLoRAConfig(task_type="SEQ_CLS"))
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, task_type="SEQ_CLS", target_modules="all-linear"))
    elif method == "frozen":
        model.requires_grad_(False)
        model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    tokens = torch.randint(50, (4, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    expected = flops_per_token(model, is_head)
    assert expected is not None
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(expected, rel=0.05)


def test_mixtures_of_experts_are_not_guessed() -> None:
    model: Any = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"num_local_experts": 8})()
    assert flops_per_token(model, is_head) is None


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.5e12
    assert peak_flops("Tesla T4", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16") is None  # a slice: a seventh, or less
    assert peak_flops("a card of tomorrow", "bf16") is None


def test_the_most_memory_is_this_program_s_and_not_that_of_the_one_which_started_it() -> None:
    ours = psutil.Process().memory_info().rss  # with torch in it
    script = "from aflora_dist.watch.resident import peak_resident; print(peak_resident())"
    theirs = int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT).stdout)
    assert 2**20 < theirs < ours / 2
