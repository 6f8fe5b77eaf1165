"""AdaptiveFreezing in a user's loop: what it needs, what it refuses, skipped updates, failures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from transformers import Trainer, TrainingArguments

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezeEvent, FreezingCallback, FreezingConfig
from aflora_dist.engines import create_engine
from aflora_dist.engines.ddp import check_hooks
from tests.launch import ROOT, launch
from tests.loop import CONFIG, Loop, assert_same
from tests.workers.tiny import build_base, build_model, global_batch
from tests.workers.trainer import build_llama


def test_a_model_that_nothing_freezes_refuses_its_second_step() -> None:
    model = build_model().train()
    model(**global_batch(0)).loss.backward()
    with pytest.raises(RuntimeError, match="AdaptiveFreezing"):
        model(**global_batch(1))
    model.eval()
    model(**global_batch(1))  # evaluation is nobody's business
    never = build_model(freezing="never").train()
    for step in range(3):
        never(**global_batch(step))


def test_inference_in_one_of_several_processes_asks_for_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As servers do that a launcher starts, each with a model of its own."""
    build_model().save_pretrained(str(tmp_path))
    Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AFLoRAError, match="2 processes were launched"):
        PeftModel.from_pretrained(build_base(), str(tmp_path), is_trainable=True)
    model = PeftModel.from_pretrained(build_base(), str(tmp_path))
    assert model(**global_batch(0)).logits.shape == (12, 2)


def test_events_reach_the_user_and_end_with_the_vectors_and_the_head() -> None:
    loop = Loop()
    seen: list[FreezeEvent] = []
    loop.freezing.on_freeze = seen.append
    for number in range(12):
        loop.step(number)
    assert seen == loop.freezing.events
    assert [e.remaining for e in seen][-1] == 0
    assert loop.freezing.step == 12
    assert all(loop.freezing.engine.parameters[name].grad is None for name in loop.freezing.frozen)
    trained = {n for n, p in loop.model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == {"s_d", "s_b", "weight", "bias"}
    assert all("classifier" in n for n in trained if n.endswith(("weight", "bias")))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile, nn.DataParallel])
def test_a_module_that_wraps_layers_changes_no_name_in_logs_snapshots_and_saved_files(wrap: Any) -> None:
    plain, loop = Loop(), Loop()
    loop.freezing.release()
    layers = loop.model.base_model.model.bert.encoder.layer
    layers[0] = wrap(layers[0])
    loop.freezing = AdaptiveFreezing(loop.accelerator, loop.model, loop.optimizer, CONFIG)
    assert loop.freezing.freezable == plain.freezing.freezable
    assert loop.freezing.progress.snapshot()[0].keys() == plain.freezing.progress.snapshot()[0].keys()
    if wrap is checkpoint_wrapper:
        loop.train(0, 4)
        plain.train(0, 4)
        assert loop.freezing.events[0].frozen == plain.freezing.events[0].frozen != []
    if wrap is not nn.DataParallel:  # whose state dicts are for DataParallel models
        assert_same(get_peft_model_state_dict(loop.model), get_peft_model_state_dict(plain.model))


def test_freezing_by_hand_takes_whole_pairs_and_known_names() -> None:
    loop = Loop(FreezingConfig(total_steps=12, initial_steps=2, final_steps=3, pairwise=True))
    loop.step(0)
    first = loop.freezing.remaining[0]
    loop.freezing.freeze([first])
    assert set(loop.freezing.frozen) == {first, first[:-1] + "B"}
    assert loop.freezing.events[0].frozen == [first, first[:-1] + "B"]
    with pytest.raises(AFLoRAError, match="still trains"):
        loop.freezing.freeze([first])
    loop.freezing.freeze([])
    assert len(loop.freezing.events) == 1
    for number in range(1, 12):
        loop.step(number)
    assert not loop.freezing.remaining


def test_freezing_by_hand_leaves_something_to_train() -> None:
    accelerator, model = Accelerator(cpu=True), build_llama(lora=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    freezing = AdaptiveFreezing(
        accelerator, model, optimizer, FreezingConfig(total_steps=4, initial_steps=1, final_steps=0)
    )
    with pytest.raises(AFLoRAError, match="the next step would have no gradient"):
        freezing.freeze(freezing.remaining)
    freezing.freeze(freezing.remaining[1:])
    assert len(freezing.remaining) == 1


def test_a_model_is_frozen_by_one_object_at_a_time() -> None:
    loop = Loop()
    with pytest.raises(AFLoRAError, match=r"detach\(\)"):
        AdaptiveFreezing(loop.accelerator, loop.model, loop.optimizer, CONFIG)
    loop.freezing.detach()
    AdaptiveFreezing(loop.accelerator, loop.model, loop.optimizer, CONFIG)


def test_after_detaching_the_rest_trains_to_the_end() -> None:
    loop = Loop()
    loop.train(0, 5)
    remaining, frozen = loop.freezing.remaining, set(loop.freezing.frozen)
    assert remaining
    assert frozen
    before = loop.weights()
    loop.freezing.detach()
    loop.train(5, 12)
    assert loop.freezing.step == 5
    after = loop.weights()
    assert all(torch.equal(after[name], before[name]) == (name in frozen) for name in (*remaining, *frozen))


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_update_moves_the_clock_and_nothing_else(fused: bool) -> None:
    """fp16's loss scaling: the scaler skips an update whose gradients overflow; a fused optimizer would by itself."""
    loop, plain = (Loop(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused)) for _ in range(2))
    loop.scale_losses()
    skipped = (1, 5)
    for number in range(12):
        before = loop.weights(), loop.freezing.remaining
        loop.step(number, clip=0.05, factor=float("inf") if number in skipped else 1.0)
        assert loop.optimizer.step_was_skipped == (number in skipped)
        assert loop.freezing.step == number + 1
        frozen = 8 - len(loop.freezing.remaining)
        assert frozen == loop.freezing.schedule.count(number, 8)  # r(t), whatever was skipped
        if number in skipped:
            assert_same(loop.weights(), before[0])
        elif number == 0 or number == 2:
            plain.step(number, clip=0.05)
        if number == 2:  # unscaled and unclipped, and untouched by the update that was skipped
            scores, expected = loop.freezing.scores(), plain.freezing.scores()
            assert scores == pytest.approx(expected, rel=1e-3, abs=0)
    assert loop.freezing.progress.skipped == 2
    assert any(event.step == 5 for event in loop.freezing.events)  # also after an update that was skipped


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_fp16_scores_are_unscaled_and_an_overflow_moves_only_the_clock(engine: str) -> None:
    done = launch(engine, 2, str(ROOT / "tests" / "workers" / "overflow.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    assert found["steps"] == list(range(1, 13))
    assert found["skipped"] == 1
    assert found["frozen_counts"] == [CONFIG.schedule().count(t, 8) for t in range(12)]
    plain = Loop()
    for number in range(4):
        plain.step(number, clip=0.05)
    (expected,) = plain.freezing.events
    assert (found["step"], found["frozen"]) == (expected.step, expected.frozen)
    assert found["scores"] == pytest.approx(expected.scores, rel=0.05, abs=0)


def test_a_nan_gradient_is_an_error_at_the_next_decision() -> None:
    loop = Loop()

    def train() -> None:
        for number in range(12):
            loop.accelerator.backward(loop.model(**global_batch(number)).loss * float("nan"))
            loop.optimizer.step()

    with pytest.raises(AFLoRAError, match="not finite after step"):
        train()


def test_models_and_schedules_that_cannot_freeze_are_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(linear := torch.nn.Linear(2, 2), torch.optim.SGD(linear.parameters(), lr=1))
    with pytest.raises(AFLoRAError, match="needs an AFLoRA model"):
        AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    model = build_model()
    head = torch.optim.SGD([p for n, p in model.named_parameters() if "classifier" in n], lr=1)
    with pytest.raises(AFLoRAError, match="nothing to freeze"):
        AdaptiveFreezing(accelerator, *accelerator.prepare(model, head), CONFIG)
    with pytest.raises(AFLoRAError, match="t_i \\+ t_f"):
        FreezingConfig(total_steps=10, initial_steps=6, final_steps=5)
    with pytest.raises(AFLoRAError, match="score must be one of"):
        FreezingConfig(total_steps=10, initial_steps=0, final_steps=5, score="magic")  # type: ignore[arg-type]
    with pytest.raises(AFLoRAError, match="beta1"):
        FreezingConfig(total_steps=10, initial_steps=0, final_steps=5, beta1=1.0)


@pytest.mark.parametrize("adapter", [{"freezable": "none"}, {"freezing": "never"}, {"freezing": "always"}])
def test_an_adapter_that_does_not_freeze_is_left_as_it_is(adapter: dict[str, str]) -> None:
    loop = Loop(**adapter)
    trained = loop.freezing.trainable_params
    for number in range(12):
        loop.step(number)
    assert (loop.freezing.step, loop.freezing.events, loop.freezing.trainable_params) == (12, [], trained)
    loop.accelerator.backward(loop.model(**global_batch(0)).loss)
    loop.accelerator.clip_grad_value_(loop.model.parameters(), 0.1)


def test_fsdp1_is_refused_by_name() -> None:
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(AFLoRAError, match=r"FSDP1 \(FullyShardedDataParallel\).*fsdp_version: 2"):
        create_engine(accelerator, nn.Linear(2, 2), None)


def test_of_ddp_s_hooks_those_are_taken_that_keep_nothing_and_give_the_mean() -> None:
    def ddp(hook: Any, state: Any) -> Any:
        return SimpleNamespace(_comm_hooks=[(hook, state)])

    for hook in (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook):
        check_hooks(ddp(hook, None))
    wrapped = default_hooks.fp16_compress_wrapper(powerSGD_hook.batched_powerSGD_hook)
    for hook, state, name in (
        (powerSGD_hook.powerSGD_hook, powerSGD_hook.PowerSGDState(None), "powerSGD_hook, whose PowerSGDState"),
        (wrapped, powerSGD_hook.PowerSGDState(None), "fp16_compress_wrapper.* whose PowerSGDState"),
        (debugging_hooks.noop_hook, None, "noop_hook"),
    ):
        with pytest.raises(AFLoRAError, match=f"DDP's communication hook {name}"):
            check_hooks(ddp(hook, state))


def test_scores_need_no_float64_on_a_device_that_has_none() -> None:
    class Mps:
        """A tensor on such a device."""

        device = torch.device("mps")

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def cpu(self) -> torch.Tensor:
            return self.tensor

        def double(self) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    loop = Loop()
    loop.train(0, 3)
    expected = loop.freezing.scores()
    for score in loop.freezing._scores.shards:
        score.smoothed, score.uncertainty = Mps(score.smoothed), Mps(score.uncertainty)  # type: ignore[assignment]
    assert loop.freezing.scores() == expected


def test_ranks_whose_decisions_agree_in_20_bits_only_are_told_apart() -> None:
    def bits(text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[:5], 16)

    seen: dict[int, str] = {}
    number = 0
    while (text := f"0['{number}']") and bits(text) not in seen:
        seen[bits(text)] = text
        number += 1
    mine, theirs = text, seen[bits(text)]
    loop = Loop()
    vectors: list[torch.Tensor] = []
    loop.freezing.engine.max_over_ranks = lambda v: vectors.append(v.clone()) or v  # type: ignore[method-assign,func-returns-value]
    loop.freezing.engine.agree(theirs, "")
    loop.freezing.engine.max_over_ranks = lambda v: torch.maximum(v, vectors[0])  # type: ignore[method-assign]
    loop.freezing.engine.agree(theirs, "")
    with pytest.raises(AFLoRAError, match="The ranks disagree"):
        loop.freezing.engine.agree(mine, "disagree")


def test_a_scheduler_made_after_attaching_sees_every_step() -> None:
    plain, loop = Loop(), Loop()
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda t: 1.0)
    for number in range(12):
        plain.step(number)
        loop.step(number)
        scheduler.step()
    assert loop.freezing.step == 12
    assert_same(loop.weights(), plain.weights())


def test_trainer_freezes_with_the_callback_as_the_loop_does(tmp_path: Any) -> None:
    examples = [{k: v[i] for k, v in global_batch(step).items()} for step in range(4) for i in range(12)]
    settings = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        num_train_epochs=5,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=build_model(), args=settings, train_dataset=examples)
    callback = FreezingCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.freezing is not None
    schedule = callback.freezing.schedule
    assert (schedule.total_steps, schedule.initial_steps, schedule.final_steps) == (20, 2, 14)
    assert callback.freezing.step == 20
    for event in callback.freezing.events:
        assert 8 - event.remaining == schedule.count(event.step, 8)
    with pytest.raises(RuntimeError, match="FreezingCallback"):
        Trainer(model=build_model(), args=settings, train_dataset=examples).train()


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["config", "decision"])
def test_ranks_that_disagree_end_with_an_error_on_every_rank(what: str) -> None:
    done = launch("ddp", 2, str(ROOT / "tests" / "workers" / "disagree.py"), what, timeout=120)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: The ranks" in done.stdout


FAILURES = {
    "on_freeze": ("ddp", ["OSError: [Errno 28] No space left", "AFLoRAError: on_freeze failed on rank 0 after step 3"]),
    "on_main": ("ddp", ["ZeroDivisionError: an oversight", "AFLoRAError: The main process failed: ZeroDivisionError"]),
    "local SGD": ("ddp", ["UnsupportedEngineError: The gradients of this update were not reduced"] * 2),
    "PowerSGD": (
        "ddp",
        ["UnsupportedEngineError: Freezing does not support DDP's communication hook powerSGD_hook"] * 2,
    ),
    "Adagrad": ("zero1", ["UnsupportedEngineError: Freezing does not support DeepSpeed's own Adagrad in place"] * 2),
    "plain backward": ("zero2", ["UnsupportedEngineError: optimizer.step() was called, but DeepSpeed has made no"] * 2),
}


@pytest.mark.distributed
@pytest.mark.parametrize("how", FAILURES)
def test_what_goes_wrong_on_one_rank_ends_all_with_the_reason(how: str) -> None:
    engine, expected = FAILURES[how]
    done = launch(engine, 2, str(ROOT / "tests" / "workers" / "failing.py"), how, timeout=120)
    assert done.returncode != 0
    for rank, said in enumerate(expected):
        assert f"rank {rank}: {said}" in done.stdout, done.stdout + done.stderr[-2000:]
