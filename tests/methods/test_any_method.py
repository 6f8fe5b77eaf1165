"""The loop, its checkpoints and its logs train any method, not AFLoRA alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from aflora_dist import AFLoRAError
from aflora_dist.adapter.saving import save_peft
from aflora_dist.control import Progress
from aflora_dist.methods import Control, NoControl
from aflora_dist.names import is_head
from aflora_dist.training.command_line import parse
from aflora_dist.training.loop import train
from aflora_dist.training.run import main
from tests.runs import lines, options


class LoRA:
    """PEFT's LoRA as a method: nothing happens to it while it trains."""

    name = "lora"

    def adapt(self, model: Any, head: Sequence[str]) -> PeftModel:
        return get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))

    def is_head(self, name: str) -> bool:
        return is_head(name)

    def check(self, updates_per_epoch: int) -> None:
        return

    def check_engine(self, kind: str, precision: str) -> None:
        return

    def attach(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, progress: Progress, log: Callable[[Any], None]
    ) -> Control:
        return NoControl()

    def saved(self, name: str, trains: bool) -> bool:
        return trains

    def save(self, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
        save_peft(model, folder, values, save_embedding_layers=False)


def run(arguments: list[str]) -> dict[str, Any]:
    config, resolved = parse(arguments)
    result = train(config, resolved, LoRA())
    assert result is not None
    return result


def test_lora_trains_logs_saves_and_resumes_to_the_bit(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = run(options(whole, tiny_model, reviews))
    saved = str(whole / "checkpoints" / "step_00000010")
    resumed = run([*options(cut, tiny_model, reviews), "--resume", saved])
    assert (result["method"], result["steps"], result["freeze_events"]) == ("lora", 24, 0)
    assert result["avg_trainable_params"] == 2 * 2 * 2 * (32 + 32)  # layers, targets, r, in + out
    assert resumed["evaluations"] == result["evaluations"]
    losses = [[line["loss"] for line in lines(folder, "metrics.jsonl")] for folder in (whole, cut)]
    assert losses[1] == losses[0][10:]
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (whole / "freeze_log.jsonl").exists()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    assert PeftModel.from_pretrained(base, whole / "adapter").peft_config["default"].peft_type == "LORA"


def test_a_checkpoint_of_another_method_is_refused(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(tmp_path / "aflora", tiny_model, reviews, **{"train.epochs": 2})) == 0
    saved = str(tmp_path / "aflora" / "checkpoints" / "step_00000005")
    ours = options(tmp_path / "lora", tiny_model, reviews, **{"train.epochs": 2})
    with pytest.raises(AFLoRAError, match=r"of another model|was written with"):
        run([*ours, "--resume", saved])
    assert json.loads((tmp_path / "aflora" / "result.json").read_text())["method"] == "aflora"
