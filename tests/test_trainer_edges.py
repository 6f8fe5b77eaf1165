"""Trainings by Trainer that end otherwise than planned, or are not the model's first, and what goes on from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from aflora_dist import AFLoRAConfig, AFLoRAError, FreezingCallback
from aflora_dist.store import checkpoint
from tests.workers.trainer import STEPS, Examples, build_llama, settings

QUARTERS = {"save_strategy": "steps", "save_steps": 4}
SECOND = AFLoRAConfig(r=2, task_type="CAUSAL_LM")


class Interrupted(TrainerCallback):
    """As Ctrl-C, or memory that is not enough, once."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and self.error is not None:
            error, self.error = self.error, None
            raise error


def trainer(model: nn.Module, out: Path, *more: TrainerCallback, freezes: bool = True, **options: Any) -> Trainer:
    callbacks = [*more, *([FreezingCallback()] if freezes else [])]
    arguments = TrainingArguments(**settings(out, **options))
    return Trainer(model, arguments, train_dataset=Examples(), eval_dataset=Examples(), callbacks=callbacks)


def freezing(of: Trainer) -> Any:
    return next(c for c in of.callback_handler.callbacks if isinstance(c, FreezingCallback)).freezing


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "aflora" in name}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6, msg=name)


def test_after_ctrl_c_the_model_trains_on_with_another_trainer_and_not_without_freezing(tmp_path: Path) -> None:
    """A notebook keeps the first one with its traceback."""
    model = build_llama()
    first = trainer(model, tmp_path, Interrupted(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = trainer(model, tmp_path)
    again.train()
    assert freezing(again).remaining == []
    assert freezing(first) is not freezing(again)


def test_a_second_training_is_gone_on_from_in_a_new_process(tmp_path: Path) -> None:
    """What had frozen in the first one is frozen before the optimizer is made."""
    model = build_llama()
    out_of_memory = RuntimeError("CUDA out of memory. Tried to allocate")
    options = {**QUARTERS, "auto_find_batch_size": True}
    whole = trainer(model, tmp_path / "retried", Interrupted(out_of_memory), **options)
    whole.train()
    assert 0 < len(freezing(whole).freezable) < 12
    resumed = trainer(build_llama(), tmp_path / "retried", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "retried" / "checkpoint-4"))
    assert freezing(resumed).frozen == freezing(whole).frozen
    assert_same(adapters(resumed.model), adapters(model))


def test_a_checkpoint_goes_only_when_the_next_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint.save

    def full(folder: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step > 4:
            raise OSError(28, "No space left on device")
        return saved(folder, step, *args, **kwargs)

    whole = trainer(build_llama(), tmp_path / "whole", **QUARTERS)
    whole.train()
    cut_short = trainer(build_llama(), tmp_path / "full", save_total_limit=1, **QUARTERS)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(AFLoRAError, match="No space left"):
            cut_short.train()
    shutil.rmtree(tmp_path / "full" / "checkpoint-8", ignore_errors=True)  # as there is room again
    resumed = trainer(build_llama(), tmp_path / "full", save_total_limit=1, **QUARTERS)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapters(resumed.model), adapters(whole.model))


def test_all_adapters_that_were_active_are_so_in_the_best_model_and_on_resuming(tmp_path: Path) -> None:
    def both() -> nn.Module:
        model = build_llama()
        model.add_adapter("b", SECOND)
        model.base_model.set_adapter(["default", "b"])
        return model

    best = {**QUARTERS, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    whole = trainer(both(), tmp_path, **best, metric_for_best_model="loss", greater_is_better=True)
    whole.train()
    assert list(whole.model.active_adapters) == ["default", "b"]
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    resumed = trainer(both(), tmp_path, **QUARTERS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert freezing(resumed).frozen == freezing(whole).frozen


def test_a_model_with_adapters_of_its_own_is_gone_on_from(tmp_path: Path) -> None:
    """transformers' add_adapter; Trainer alone looks for the files of a whole model, and ends there."""

    def own() -> nn.Module:
        model = build_llama().unload()
        model.add_adapter(AFLoRAConfig(r=2))
        return model

    best = {**QUARTERS, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    whole = trainer(own(), tmp_path, **best, metric_for_best_model="loss", greater_is_better=True)
    whole.train()
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    undisturbed, resumed = trainer(own(), tmp_path / "undisturbed"), trainer(own(), tmp_path, **QUARTERS)
    undisturbed.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(adapters(resumed.model), adapters(undisturbed.model))


def test_who_stops_early_on_purpose_is_told_nothing_of_the_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    early = trainer(build_llama(), tmp_path, EarlyStoppingCallback(1), **often, **best)
    early.train()
    freezing(early)._exit()
    assert early.state.global_step < STEPS
    assert "total_steps" not in capsys.readouterr().err


@pytest.mark.parametrize("freezes", [True, False])
def test_a_folder_that_is_not_there_is_said(freezes: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        trainer(build_llama(), tmp_path, freezes=freezes).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_method_s_option_that_it_has_not_is_explained_to_who_asks() -> None:
    """As TRL does of trainable_token_indices, where a chat template adds tokens."""
    with pytest.raises(AttributeError, match="single tokens cannot be trained"):
        _ = AFLoRAConfig().trainable_token_indices
    assert not hasattr(AFLoRAConfig(), "rank_pattern")


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("steps", [6, STEPS])
def test_an_evaluation_of_the_base_model_between_two_trainings_changes_neither(
    steps: int, same: bool, tmp_path: Path
) -> None:
    """PEFT lets all of an adapter train again when it ends."""

    def train(evaluates: bool) -> tuple[Any, list[float], dict[str, int]]:
        model: Any = build_llama(lora=True)
        options: dict[str, Any] = {"max_grad_norm": 0.1, "lr_scheduler_type": "constant"}
        callback = FreezingCallback(freezable=r".*\.mlp\..*lora_.*")
        first = trainer(model, tmp_path, callback, StopsAt(steps), freezes=False, **options)
        first.train()
        if evaluates:
            with model.disable_adapter():
                first.evaluate()
        gone = {name: model.get_parameter(name).detach().clone() for name in freezing(first).frozen}
        first.remove_callback(StopsAt)
        again = FreezingCallback(freezable=callback.freezable)
        second = first if same else trainer(model, tmp_path, again, freezes=False, **options)
        second.train()
        assert gone
        assert all(torch.equal(model.get_parameter(name), value) for name, value in gone.items())
        norms = [line["grad_norm"] for line in second.state.log_history if "grad_norm" in line]
        return model, norms, freezing(second).frozen

    (model, norms, frozen), (undisturbed, *expected) = train(True), train(False)
    assert [norms, frozen] == expected
    for (name, value), other in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_an_evaluation_of_the_base_model_before_going_on_from_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    values = []
    for evaluates in (False, True):
        model: Any = build_llama(lora=True)
        callback = FreezingCallback(freezable=r".*\.mlp\..*lora_.*")
        whole = trainer(model, tmp_path, callback, freezes=False, **QUARTERS)
        whole.train()
        if evaluates:
            with model.disable_adapter():
                whole.evaluate()
        whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        values.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_same(*values)


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("rate", "lora", "warns"), [(5e-5, False, True), (1e-3, False, False), (5e-5, True, False)])
def test_rates_at_which_aflora_learns_nothing_are_said(
    rate: float,
    lora: bool,
    warns: bool,
    warmup: int,
    scheduler: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callback = FreezingCallback(freezable=r".*\.mlp\..*lora_.*" if lora else None)
    schedule = {"warmup_steps": warmup, "lr_scheduler_type": scheduler}
    low = trainer(build_llama(lora), tmp_path, callback, freezes=False, learning_rate=rate, max_steps=4, **schedule)
    low.train()
    assert ("learns next to nothing at a learning rate of 5e-05" in capsys.readouterr().err) is warns


def test_a_callback_that_is_added_after_a_first_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The optimizer that is there then was made by Trainer, and not given to it."""
    source = trainer(build_llama(), tmp_path, **QUARTERS)
    source.train()
    late = trainer(build_llama(), tmp_path / "late", freezes=False)
    late.args.max_steps = 1
    late.train()
    late.args.max_steps = -1
    late.add_callback(FreezingCallback())
    late.train()
    late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert freezing(late).frozen == freezing(source).frozen
    assert_same(adapters(late.model), adapters(source.model))


def test_names_that_come_once_are_kept_for_further_trainings(tmp_path: Path) -> None:
    model = build_llama(lora=True)
    names = [name for name, p in model.named_parameters() if ".mlp." in name and p.requires_grad]
    of = trainer(model, tmp_path, FreezingCallback(freezable=iter(names)), StopsAt(6), freezes=False)
    of.train()
    some = {*freezing(of).frozen}
    of.remove_callback(StopsAt)
    of.train()
    assert some
    assert {*freezing(of).frozen} == {*names} - some
    with pytest.raises(AFLoRAError, match="it got 3"):
        FreezingCallback(freezable=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("freezable", [None, r".*\.mlp\..*"])
def test_an_adapter_that_was_loaded_without_is_trainable_is_told_so(
    freezable: str | None, lora: bool, tmp_path: Path
) -> None:
    build_llama(lora).save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build_llama().unload(), str(tmp_path / "adapter"))
    with pytest.raises(AFLoRAError, match=r"'default' was loaded for inference alone.* is_trainable=True"):
        trainer(loaded, tmp_path, FreezingCallback(freezable=freezable), freezes=False).train()
