"""accelerate's own ways: save_state and load_state, free_memory, end_training."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from tests.loop import CONFIG, Loop, assert_same
from tests.workers.tiny import build_model, build_optimizer, global_batch


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("after", [2, 5, 9, 12])
def test_accelerate_s_own_checkpoint_holds_the_freezing(registered: bool, after: int, tmp_path: Path) -> None:
    """Before the first freeze, between two, and after the last."""
    whole, cut, resumed = Loop(), Loop(), Loop()
    whole.train()
    if registered:
        cut.accelerator.register_for_checkpointing(cut.freezing)
        resumed.accelerator.register_for_checkpointing(resumed.freezing)
    cut.train(0, after)
    cut.accelerator.save_state(str(tmp_path / "state"))
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.freezing.step == after
    resumed.train(after, 12)
    assert [(e.step, e.frozen, e.scores) for e in resumed.freezing.events] == [
        (e.step, e.frozen, e.scores) for e in whole.freezing.events
    ]
    assert_same(resumed.weights(), whole.weights())


def test_an_earlier_checkpoint_can_be_loaded_after_further_freezes(tmp_path: Path) -> None:
    whole, loop = Loop(), Loop()
    whole.train()
    loop.train(0, 4)
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.train(4, 12)
    loop.accelerator.load_state(str(tmp_path / "state"))
    assert loop.freezing.step == 4
    loop.train(4, 12)
    assert_same(loop.weights(), whole.weights())


def test_a_checkpoint_without_freezing_or_of_another_schedule_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    loop.accelerator.save_state(str(tmp_path / "state"))
    other = Loop(FreezingConfig(total_steps=12, initial_steps=3, final_steps=3))
    with pytest.raises(AFLoRAError, match="initial_steps is 2 there and 3 here"):
        other.accelerator.load_state(str(tmp_path / "state"))
    (tmp_path / "state" / "aflora_freezing.pt").unlink()
    before = loop.weights()
    with pytest.raises(AFLoRAError, match="saved without AdaptiveFreezing"):
        loop.accelerator.load_state(str(tmp_path / "state"))
    assert_same(loop.weights(), before)
    with pytest.raises(AFLoRAError, match=r"There is no folder .*elsewhere"):
        loop.accelerator.load_state(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("left", [0, 100, -200])
def test_a_damaged_file_of_freezing_is_named(left: int, tmp_path: Path) -> None:
    loop = Loop()
    loop.train(0, 4)
    loop.accelerator.save_state(str(tmp_path / "state"))
    file = tmp_path / "state" / "aflora_freezing.pt"
    file.write_bytes(file.read_bytes()[:left])
    before = loop.weights()
    with pytest.raises(AFLoRAError, match=rf"{file} cannot be read: .*\. Take another checkpoint\."):
        loop.accelerator.load_state(str(tmp_path / "state"))
    assert_same(loop.weights(), before)


def test_a_checkpoint_that_was_killed_while_it_was_written_over_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """Later weights beside an earlier clock, with as many matrices frozen, would be gone on from in silence."""
    loop = Loop()
    loop.train(0, 4)
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.train(4, 5)
    original = loop.accelerator._custom_objects
    loop.accelerator._custom_objects = [Killed()]  # accelerate saves them last
    with pytest.raises(KeyboardInterrupt):
        loop.accelerator.save_state(str(tmp_path / "state"))
    loop.accelerator._custom_objects = original
    with pytest.raises(AFLoRAError, match="or its saving was cut short"):
        loop.accelerator.load_state(str(tmp_path / "state"))
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.accelerator.load_state(str(tmp_path / "state"))
    assert loop.freezing.step == 5


class Killed:
    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt


def test_the_seed_of_an_order_counts_where_there_is_one(tmp_path: Path) -> None:
    """An earlier release's checkpoints have 0 there, whatever the training's seed is."""
    loops = {
        (score, seed): Loop(FreezingConfig(total_steps=12, initial_steps=2, final_steps=3, score=score, seed=seed))
        for score in ("gradient", "random")
        for seed in (0, 1)
    }
    for score in ("gradient", "random"):
        loops[score, 0].accelerator.save_state(str(tmp_path / score))
    loops["gradient", 1].accelerator.load_state(str(tmp_path / "gradient"))
    with pytest.raises(AFLoRAError, match="seed is 0 there and 1 here"):
        loops["random", 1].accelerator.load_state(str(tmp_path / "random"))


def test_a_second_training_in_one_process_frees_the_first() -> None:
    accelerator = Accelerator(cpu=True)
    gone: list[weakref.ref[Any]] = []
    logs = []
    for steps in (12, 12, 6):  # cross-validation, find_executable_batch_size
        model = build_model()
        model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
        freezing = AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
        for number in range(steps):
            accelerator.backward(model(**global_batch(number)).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        logs.append([(e.step, e.frozen, e.scores) for e in freezing.events])
        gone += [weakref.ref(model), weakref.ref(freezing), weakref.ref(freezing.engine)]
        model, optimizer = accelerator.free_memory(model, optimizer)
        del freezing
        gc.collect()
        assert [reference() for reference in gone] == [None] * len(gone)
    assert logs[0] == logs[1]
    assert logs[2] == logs[0][: len(logs[2])] != []


def test_two_models_do_not_share_what_a_snapshot_holds() -> None:
    first, second = Loop(), Loop()
    first.train(0, 4)
    tensors, record = first.freezing.progress.snapshot()
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    second.freezing.progress.restore(tensors, record)
    first.train(4, 8)
    assert_same(tensors, kept)
    second.train(4, 8)
    assert_same(tensors, kept)
    assert_same(first.weights(), second.weights())


def test_a_training_shorter_than_its_schedule_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def said(loop: Loop) -> str:
        capsys.readouterr()
        loop.accelerator.end_training()
        return capsys.readouterr().err

    short, whole, stopped, forgotten = Loop(), Loop(), Loop(), Loop()
    short.train(0, 4)
    assert "ended after 4 of the 12 global batches" in said(short)
    assert said(short) == ""  # once
    whole.train()
    assert said(whole) == ""
    stopped.train(0, 4)
    stopped.freezing.interrupted()
    assert said(stopped) == ""
    forgotten.train(0, 5)
    del forgotten
    gc.collect()
    assert "ended after 5 of the 12" in capsys.readouterr().err


def test_what_an_error_explains_is_not_complained_of_again(capsys: pytest.CaptureFixture[str]) -> None:
    failed, recovered = Loop(), Loop()
    for loop in (failed, recovered):
        loop.train(0, 4)
        with pytest.raises(AFLoRAError):
            loop.freezing.freeze(["nothing of that name"])
    recovered.step(4)
    del loop, failed
    gc.collect()
    assert capsys.readouterr().err == ""
    recovered.accelerator.end_training()
    assert "ended after 5 of the 12" in capsys.readouterr().err
