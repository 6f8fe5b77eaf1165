"""What docs/extend.md adds to the package: each diff is applied to a copy of it, and what it adds is tried."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, free_port
from tests.pages import blocks
from tests.runs import options

# Eq. 2 to 4 of two steps by hand, with I = g^2; and a combination that it does not have.
SCORE = """
import torch
from aflora_dist import AFLoRAError, FreezingConfig
from aflora_dist.freezing import Fragment, FreezingScore

score = FreezingScore([Fragment("A", 0, 3)], "cpu", kind="fisher")
smoothed = uncertainty = torch.zeros(3, dtype=torch.float64)
for g in (torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 3.0, -1.0])):
    score.observe([g], scale=2.0)
    importance = (2.0 * g.double()) ** 2
    smoothed = 0.85 * smoothed + 0.15 * importance
    uncertainty = 0.95 * uncertainty + 0.05 * (importance - smoothed).abs()
torch.testing.assert_close(score.partial_sums()["A"], (smoothed * uncertainty).sum(), rtol=1e-6, atol=0)
try:
    FreezingConfig(total_steps=9, initial_steps=1, final_steps=1, score="fisher", granularity="matrix")
    raise SystemExit("not refused")
except AFLoRAError as error:
    print(error)

# And a schedule, in equal steps: of 8 matrices one more at each step from t_i to T - t_f.
schedule = FreezingConfig(total_steps=20, initial_steps=4, final_steps=8, shape="linear").schedule()
assert [schedule.count(step, 8) for step in range(4, 13)] == list(range(9))
"""

# Half of the weight of a neighbour's lies on the class itself, and the run is one of this task.
TASK = """
import sys
from types import SimpleNamespace
import torch
from aflora_dist.tasks.ordinal import Ordinal
from aflora_dist.training.run import main

logits = torch.tensor([[0.5, -1.0, 2.0]])
task = Ordinal(SimpleNamespace(data=SimpleNamespace(task="ordinal")))
loss = task.loss(lambda **batch: SimpleNamespace(logits=logits), {"labels": torch.tensor([2])})
right = torch.tensor([-4.0, -2.0, 0.0]).exp()
torch.testing.assert_close(loss, -(right / right.sum() * logits.log_softmax(-1)).sum())
sys.exit(main(sys.argv[1:]))
"""

# Ranks, with half a batch each and no DDP around the model, or one process with all of it.
ENGINE = """
import json, os
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from aflora_dist import AdaptiveFreezing
from tests.loop import CONFIG
from tests.workers.tiny import build_model, build_optimizer, global_batch

ranks = int(os.environ.get("WORLD_SIZE", 1))
accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if ranks > 1 else [])
model = build_model()
optimizer = accelerator.prepare(build_optimizer(model, "head"))
freezing = AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
for number in range(CONFIG.total_steps):
    mine = {key: value[accelerator.process_index :: ranks] for key, value in global_batch(number).items()}
    accelerator.backward(model(**mine).loss)
    optimizer.step()
    optimizer.zero_grad()
norms = {n: p.norm().item() for n, p in model.named_parameters() if "aflora" in n}
print(json.dumps([freezing.progress.engine.kind, [e.frozen for e in freezing.events], norms]))
"""


@pytest.fixture
def extended(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the package after the diffs of the page that the parameter numbers."""
    shutil.copytree(ROOT / "aflora_dist", tmp_path / "aflora_dist", ignore=shutil.ignore_patterns("__pycache__"))
    diffs = [block.text for block in blocks(ROOT / "docs" / "extend.md") if block.language == "diff"]
    assert len(diffs) == 4
    apply = ["git", "apply", "--unsafe-paths", "-C1", "-"]
    for number in request.param:
        done = subprocess.run(apply, input=diffs[number], cwd=tmp_path, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    return tmp_path


def begin(code: str, package: Path, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{package}:{ROOT}", "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=package, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))  # torch 2.10's


@pytest.mark.parametrize("extended", [(0, 1)], indirect=True)
def test_the_score_and_the_schedule(extended: Path) -> None:
    assert "score=fisher looks at each element" in said(begin(SCORE, extended))


@pytest.mark.parametrize("extended", [(2,)], indirect=True)
def test_the_task(extended: Path, tiny_model: Path, reviews: Path) -> None:
    run = extended / "run"
    arguments = options(run, tiny_model, reviews, **{"data.task": "ordinal", "train.epochs": 2, "run.save_every": 0})
    said(begin(TASK, extended, *arguments))
    assert json.loads((run / "result.json").read_text())["task"] == "ordinal"


@pytest.mark.distributed
@pytest.mark.parametrize("extended", [(3,)], indirect=True)
def test_the_engine(extended: Path) -> None:
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [begin(ENGINE, extended, **together, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    alone = json.loads(said(begin(ENGINE, extended)))
    for kind, frozen, norms in (json.loads(said(rank)) for rank in ranks):
        assert (kind, frozen) == ("by_hand", alone[1])
        assert norms == pytest.approx(alone[2], rel=1e-5)
