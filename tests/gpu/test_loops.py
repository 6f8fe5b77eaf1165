"""On a GPU, in one process: Trainer in fp16 with its own optimizer, and seconds that are freezing's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from aflora_dist import AdaptiveFreezing, FreezeEvent, FreezingCallback, FreezingConfig
from tests.workers.tiny import build_model, build_optimizer, global_batch
from tests.workers.trainer import Examples, build_llama, settings

pytestmark = pytest.mark.gpu


def test_trainer_in_fp16_freezes_the_same_with_its_fused_optimizer_as_with_another(device: str, tmp_path: Path) -> None:
    if device == "cpu":
        pytest.skip("accelerate has fp16 for CUDA devices only")

    def events(optim: str) -> list[FreezeEvent]:
        callback = FreezingCallback()
        arguments = TrainingArguments(**settings(tmp_path / optim, use_cpu=False, fp16=True, optim=optim))
        trainer = Trainer(build_llama(), arguments, train_dataset=Examples(), callbacks=[callback])
        trainer.train()
        assert callback.freezing is not None
        return callback.freezing.events

    fused, plain = events("adamw_torch_fused"), events("adamw_torch")
    assert [(e.step, sorted(e.frozen)) for e in fused] == [(e.step, sorted(e.frozen)) for e in plain]
    assert fused[-1].remaining == 0


def test_a_freeze_does_not_count_what_the_gpu_had_queued_before(device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU queues nothing")
    accelerator = Accelerator()
    model = build_model().train()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
    config = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    queued = []
    for number in range(12):
        accelerator.backward(model(**{k: v.to(accelerator.device) for k, v in global_batch(number).items()}).loss)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        torch.cuda._sleep(2_000_000_000)  # cycles: a second or so
        last.record()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        queued.append(first.elapsed_time(last) / 1e3)
    assert freezing.events
    assert freezing.seconds < sum(queued) / 4
