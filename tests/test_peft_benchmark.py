"""examples/peft_benchmark beside a program that calls what PEFT's run.py calls, in its order; not PEFT's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aflora_dist import FreezingConfig
from tests.launch import ROOT
from tests.loop import Loop

EXAMPLE = ROOT / "examples" / "peft_benchmark"
CLIP = 0.05
UTILS = """
import torch
def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **optimizer_kwargs):
    optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **optimizer_kwargs)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
"""
RUN = f"""
import sys, torch
from utils import get_optimizer_and_scheduler
from tests.workers.tiny import build_model, global_batch
model = build_model()
optimizer, lr_scheduler = get_optimizer_and_scheduler(
    model, optimizer_type="AdamW", max_steps=12, lr_scheduler_arg=None, lr=1e-2
)
for step in range(12):
    optimizer.zero_grad()
    model(**global_batch(step)).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), {CLIP})
    optimizer.step()
    lr_scheduler.step()
torch.save({{n: p.detach() for n, p in model.named_parameters()}}, sys.argv[1] + "/trained.pt")
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    (folder / "run.py").write_text(RUN)
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "with_freezing.py"), "experiment"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_it_trains_and_freezes_as_a_loop_with_accelerate(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "freezing.json").write_text('{"initial_steps": 2, "final_steps": 3}')
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = torch.load(tmp_path / "experiment" / "trained.pt")
    loop = Loop(
        FreezingConfig(total_steps=12, initial_steps=2, final_steps=3), lambda members: torch.optim.AdamW(members, 1e-2)
    )
    for step in range(12):
        loop.step(step, CLIP)
    for name, value in loop.weights().items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6, msg=name)
    said = [f"step {event.step}: {event.remaining} still train" for event in loop.freezing.events]
    assert done.stderr.splitlines()[-len(said) :] == said


def test_an_adapter_that_is_to_freeze_is_not_trained_without_a_freezing_json(tmp_path: Path) -> None:
    assert "but nothing freezes it" in run(tmp_path).stderr


@pytest.mark.parametrize("folder", sorted(EXAMPLE.glob("experiments/*/*")), ids=lambda path: path.parent.name)
def test_the_experiments_options_are_freezing_s(folder: Path) -> None:
    FreezingConfig(total_steps=5000, **json.loads((folder / "freezing.json").read_text()))
    assert (folder / "adapter_config.json").is_file()
