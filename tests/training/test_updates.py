"""How many updates there are, how large each is, by which optimizer, and when the model is measured."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from aflora_dist import AFLoRAError, extras
from aflora_dist.engines import examine
from aflora_dist.methods.choose import create_method
from aflora_dist.options import TrainConfig
from aflora_dist.options.job import Optimizer
from aflora_dist.plan.launches import Launch
from aflora_dist.plan.plan import make_plan
from aflora_dist.tasks.sft.loss import ChunkedCrossEntropy
from aflora_dist.training.build import create_optimizer, create_schedule
from aflora_dist.training.command_line import parse
from tests.runs import assert_same_to_the_bit, lines, options, start, start_all
from tests.small_lm import make_small_language_model

# 6 updates are an epoch: 17 end in the midst of the third.
CHOSEN: dict[str, Any] = {
    "train.max_steps": 17,
    "train.schedule": "cosine",
    "train.warmup_steps": 3,
    "train.learning_rate": 0.05,
    "train.optimizer": "RAdam",
    "train.optimizer_options": '{"betas": [0.8, 0.95]}',
    "train.loraplus_lr_ratio": 4,
    "train.label_smoothing": 0.1,
    "run.eval_every": 4,
    "run.keep_best": "accuracy",
    "freezing.final_epochs": 0.5,
}


def configuration(*more: str) -> Any:
    return parse(["--model.name", "m", *more])[0]


@pytest.mark.parametrize("engine", ["single", pytest.param("zero3", marks=pytest.mark.distributed)])
def test_all_of_it_at_once_resumes_to_the_bit(engine: str, tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    start_all(engine, [options(whole, tiny_model, reviews, **CHOSEN)])
    result, log = json.loads((whole / "result.json").read_text()), lines(whole, "metrics.jsonl")
    assert (result["steps"], result["evaluated_at"]) == (17, [4, 8, 12, 16, 17])
    assert result["last"]["epoch"] == pytest.approx(17 / 6, abs=1e-4)
    assert len(result["evaluations"]) == 5
    assert round(result["best"]["epoch"] * 6) in result["evaluated_at"]
    rise = [step / 3 for step in range(3)]
    fall = [0.5 * (1 + math.cos(math.pi * step / 14)) for step in range(14)]
    assert [line["lr"] for line in log] == pytest.approx([0.05 * factor for factor in rise + fall])
    assert lines(whole, "freeze_log.jsonl")[-1]["step"] <= 14  # t_f is half an epoch, of 17 updates

    for left_off in ("step_00000010", "step_00000005"):  # between evaluations, and before one
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("adapter", "result.json"))
        for folder in (resumed / "checkpoints").iterdir():
            if folder.name > left_off:
                shutil.rmtree(folder)
        start_all(engine, [options(resumed, tiny_model, reviews, **CHOSEN, **{"run.resume": "last"})])
        assert_same_to_the_bit(resumed, whole)
        assert json.loads((resumed / "result.json").read_text())["best"] == result["best"]
        shutil.rmtree(resumed)
        if engine != "single":
            break


def test_a_checkpoint_that_an_evaluation_follows_or_an_epoch_s_end_resumes_to_the_bit(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """With dropout: what random numbers an evaluation and a new epoch draw has to be drawn again."""
    chosen = {**CHOSEN, "adapter.dropout": 0.2, "run.save_every": 2}
    whole = tmp_path / "whole"
    start_all("single", [options(whole, tiny_model, reviews, **chosen)])
    for left_off in ("step_00000006", "step_00000008"):
        resumed = tmp_path / left_off
        shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("adapter", "result.json"))
        for folder in (resumed / "checkpoints").iterdir():
            if folder.name > left_off:
                shutil.rmtree(folder)
        start_all("single", [options(resumed, tiny_model, reviews, **chosen, **{"run.resume": "last"})])
        assert_same_to_the_bit(resumed, whole)


def test_patience_ends_a_run_in_the_midst_of_an_epoch(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    more = {"train.learning_rate": 0, "train.head_learning_rate": 0, "run.patience": 2}
    done = start("single", options(tmp_path / "run", tiny_model, reviews, **{**CHOSEN, **more}))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["evaluated_at"]) == (12, [4, 8, 12])
    assert "Ended after epoch 2 of 2.83333: accuracy has not improved since epoch 0.6667." in done.stdout + done.stderr


def test_a_plan_knows_how_many_updates_there_are_and_what_the_optimizer_keeps(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    launch = [Launch(engine="single", num_processes=1, mixed_precision="no")]

    def plan(**more: Any) -> Any:
        return make_plan(parse(options(tmp_path / "run", tiny_model, reviews, **{**CHOSEN, **more}))[0], launch)

    adam, momentum = plan(), plan(**{"train.optimizer": "SGD", "train.optimizer_options": '{"momentum": 0.9}'})
    assert (adam.steps.total, adam.steps.warm_up) == (17, 3)
    assert adam.freezes[-1].step <= 14
    assert [2 * size for size in momentum.engines[0].optimizer_bytes[0]] == adam.engines[0].optimizer_bytes[0]
    with pytest.raises(
        AFLoRAError, match=r"freezing.final_epochs = 0.5 \+ 2.5, but .* 2.83333 epochs \(.*train.max_steps"
    ):
        plan(**{"freezing.final_epochs": 2.5})
    with pytest.raises(AFLoRAError, match=r"train.warmup_steps=18 is more than the 17 updates"):
        plan(**{"train.warmup_steps": 18})


SCHEDULES = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "constant": lambda p: 1,
    "warmup_stable_decay": lambda p: 1 if p <= 0.75 else 0.5 * (1 + math.cos(math.pi * (p - 0.75) / 0.25)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_what_their_formulas_say_for_every_group(name: str) -> None:
    config = configuration("--train.schedule", name, "--train.warmup_steps", "10")
    if name == "warmup_stable_decay":
        config = configuration(
            *("--train.schedule", name, "--train.warmup_steps", "10"),
            *("--train.schedule_options", '{"num_decay_steps": 10}'),
        )
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 2.0}]
    schedule = create_schedule(config, torch.optim.SGD(groups), 50)
    found = []
    for _ in range(50):
        found.append(schedule.get_last_lr())
        schedule.optimizer.step()
        schedule.step()
    factors = [t / 10 if t < 10 else SCHEDULES[name]((t - 10) / 40) for t in range(50)]
    assert [rate for rate, _ in found] == pytest.approx([0.1 * factor for factor in factors])
    assert [rate for _, rate in found] == pytest.approx([2.0 * factor for factor in factors])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"schedule_options": {"num_cycle": 2}, "schedule": "cosine"},
            "schedule=cosine does not take {'num_cycle': 2}",
        ),
        ({"schedule_options": {"min_lr": 2}, "schedule": "cosine_with_min_lr"}, "say min_lr_rate, a share of it"),
        ({"schedule_options": {"timescale": 0}, "schedule": "inverse_sqrt"}, "does not take {'timescale': 0}"),
        ({"optimizer_options": {"lr": 1}}, "optimizer_options names lr: rates and weight decay are"),
        ({"optimizer_options": {"beta": 1}}, "optimizer=AdamW does not take {'beta': 1}"),
        ({"loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio is for methods with matrices A and B; full has none"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    config = configuration("--method.name", "full")
    config = replace(config, train=TrainConfig(**options))

    def create() -> None:
        create_optimizer(config, torch.nn.Linear(2, 2), create_method(config))
        create_schedule(config, torch.optim.SGD([torch.zeros(1)]), 50)

    with pytest.raises(AFLoRAError, match=said):
        create()


@pytest.mark.parametrize("name", [name for name in get_args(Optimizer) if "." not in name])
def test_every_optimizer_s_matrices_can_leave_it(name: str) -> None:
    made = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    examine(made, torch.device("cpu"))  # raises where freezing would not be exact


def test_an_optimizer_that_is_not_known_or_not_installed_says_which_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        AFLoRAError, match=r"one of AdamW, .*RMSprop.*bitsandbytes\.PagedAdamW32bit, .*, not paged_adamw"
    ):
        configuration("--train.optimizer", "paged_adamw_8bit")
    monkeypatch.setattr(extras, "installed", lambda module: module != "bitsandbytes")
    config = configuration("--train.optimizer", "bitsandbytes.PagedLion32bit")
    with pytest.raises(AFLoRAError, match=r"train.optimizer=bitsandbytes.PagedLion32bit needs bitsandbytes, .*pip"):
        create_optimizer(config, torch.nn.Linear(2, 2), create_method(config))


def test_label_smoothing_is_the_formula_s_where_gradients_are_taken_and_nowhere_else(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_small_language_model(tmp_path / "model"))
    tokens = torch.arange(12).reshape(2, 6)
    positions, targets = torch.tensor([0, 1, 7]), torch.tensor([1, 2, 8])
    logits = model(tokens).logits.flatten(0, 1)[positions].float()
    logs = F.log_softmax(logits, dim=-1)
    plain = -logs.gather(1, targets[:, None]).sum()
    smoothed = 0.9 * plain - 0.1 * logs.mean(1).sum()
    for whole in (False, True):
        loss = ChunkedCrossEntropy(model, logits_per_chunk=100, smoothing=0.1)
        loss.whole = whole
        found = loss(model, {"input_ids": tokens}, positions, targets)
        assert torch.allclose(found, smoothed, rtol=1e-5)
        with torch.no_grad():
            assert torch.allclose(loss(model, {"input_ids": tokens}, positions, targets), plain, rtol=1e-5)
        model.lm_head.__dict__.pop("forward", None)
