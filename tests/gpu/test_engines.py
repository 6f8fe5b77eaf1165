"""On a GPU every engine freezes what one process on a CPU does: NCCL, loss scaling, offload."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from profiling.gpu import end
from tests.gpu.worker import STEPS
from tests.launch import free_port, launch
from tests.ranks import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]
PATIENCE = 300  # the first offload compiles DeepSpeed's CPU Adam
KINDS = {"ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2", "zero3_offload": "zero3"}


def see(device: str, engine: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the worker saw, really launched. GPUs: all there are, mostly one; CPU: two ranks."""
    ranks = min(torch.cuda.device_count(), 4) if device == "cuda" else 2
    out = folder / f"{engine}_{device}.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    worker = ["tests.gpu.worker", str(out), *options]
    # `accelerate launch` refuses DDP and FSDP with one process.
    torchrun = ["torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", "-m"]
    if engine.startswith("zero"):
        file = ["--config_file", str(ROOT / "launch" / f"{engine}.yaml"), "--mixed_precision", "no"]
        file += ["--num_processes", str(ranks), "--main_process_port", str(free_port())]
        command = ["accelerate.commands.launch", *file, "-m", *worker]
    elif engine == "single":
        command = worker
    elif engine == "fsdp2" and device == "cpu":
        command = [*torchrun, "profiling.fsdp_on_cpu", *worker]
    elif engine == "fsdp2":
        from profiling.fsdp_on_cpu import ENVIRONMENT

        environment |= ENVIRONMENT
        command = [*torchrun, *worker]
    else:
        command = [*torchrun, *worker]
    if os.environ.get("AFLORA_GPU_TESTS_ON_CPU") == "1":  # the tests are tried, not the launchers
        module = ["profiling.fsdp_on_cpu", *worker] if engine == "fsdp2" else worker
        done = launch(engine.removesuffix("_offload"), 1 if engine == "single" else ranks, "-m", *module)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(out.read_text())
    if device == "cpu" and not engine.startswith("zero"):
        environment["ACCELERATE_USE_CPU"] = "true"
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            process.wait(PATIENCE)
        finally:
            end(process)
    assert process.returncode == 0, (folder / "log.txt").read_text()[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one_process(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """On the CPU: without a GPU's sums in other orders, and without a process group."""
    return see("cpu", "single", tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("engine", ["single", *KINDS])
def test_an_engine_freezes_and_learns_what_one_process_on_a_cpu_does(
    engine: str, device: str, one_process: dict[str, Any], tmp_path: Path
) -> None:
    seen = see(device, engine, tmp_path)
    assert seen["kind"] == KINDS.get(engine, "single")
    assert seen["device"] == device
    assert seen["backend"] == (None if engine == "single" else {"cuda": "nccl", "cpu": "gloo"}[device])
    assert seen["steps"] == list(range(1, STEPS + 1))
    assert [(step, frozen) for step, frozen, _ in seen["events"]] == [(s, f) for s, f, _ in one_process["events"]]
    assert seen["events"][-1][0] < STEPS
    for (_, _, ours), (_, _, theirs) in zip(seen["events"], one_process["events"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=0)  # they are as small as 1e-15
    assert seen["losses"] == pytest.approx(one_process["losses"], abs=1e-4)
    # A freeze starts no peak anew and hands no cached memory back; gloo stands beside NCCL where there are ranks;
    # what was loaded is there when it is next used, on whatever stream.
    assert seen["peaks"] == sorted(seen["peaks"])
    assert seen["reserved"] == sorted(seen["reserved"])
    assert len(seen["peaks"]) == (STEPS if device == "cuda" else 0)
    assert seen["cpu_group"] == (None if seen["ranks"] == 1 else "gloo")
    before, noise, after = seen["restored"]
    assert after == before
    assert noise != before


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "zero3"])
def test_a_batch_that_overflows_moves_the_clock_and_no_score(engine: str, device: str, tmp_path: Path) -> None:
    if device == "cpu" and not engine.startswith("zero"):
        pytest.skip("accelerate has fp16 for CUDA devices only")
    seen = see(device, engine, tmp_path, "--half", "--overflow", "4")
    assert seen["skipped"] == 1
    assert seen["steps"] == list(range(1, STEPS + 1))
    before, after = seen["scores"][3], seen["scores"][4]
    assert after
    # ZeRO-1 and 2 cut the flat buffer anew at the freeze, and with it the order of sums; an update changes far more.
    assert after == pytest.approx({name: before[name] for name in after}, rel=1e-6, abs=0)
    assert all(seen["scores"][5][name] != pytest.approx(after[name], rel=1e-3, abs=0) for name in seen["scores"][5])
    frozen = {step: len(names) for step, names, _ in seen["events"]}
    assert sum(frozen.values()) == 8  # all of them, at the positions that the clock gives
    assert max(frozen) == STEPS - 3
