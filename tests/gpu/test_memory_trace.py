"""On a GPU: memory falls at each freeze, the profiler plugin reads a real trace, the kernels compute the same."""

from __future__ import annotations

import gc
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from profiling import kernels
from tests.tensorboard import PROFILER, TensorBoard
from tests.workers.rebuild import tensor_bytes

pytestmark = pytest.mark.gpu


class Wide(nn.Module):
    """Layers whose adapters weigh something: the allocator counts in blocks of 512 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adapted(device: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AFLoRAConfig(r=4, target_modules=["layers.0", "layers.1", "layers.2"], freezable="all")
    return get_peft_model(Wide().to(device, dtype), config)


def held(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else tensor_bytes()


def test_memory_falls_at_each_freeze_by_all_that_a_matrix_had(device: str) -> None:
    """At least two moments and two score averages of 4 x 2048 float32 numbers; the matrix itself stays."""
    accelerator = Accelerator(cpu=device == "cpu")
    model = adapted(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    config = FreezingConfig(total_steps=20, initial_steps=4, final_steps=4)
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    x = torch.randn(8, 2048, device=accelerator.device)
    bytes_after, remaining = [], []
    for _ in range(20):
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bytes_after.append(held(device))
        remaining.append(len(freezing.remaining))
    assert remaining[1] == 6
    assert remaining[-1] == 0
    for t in range(2, 20):
        froze = remaining[t - 1] - remaining[t]
        assert bytes_after[t - 1] - bytes_after[t] >= froze * 4 * (4 * 2048 * 4) - 8192, f"at step {t}"


def test_the_profiler_plugin_reads_the_trace_of_a_run(device: str, arguments: list[str], tmp_path: Path) -> None:
    from aflora_dist.training.run import main

    pytest.importorskip("torch_tb_profiler", reason="needs the package torch-tb-profiler")
    assert main([*arguments, "--profile", "--profile.steps", "1"]) == 0
    with TensorBoard(tmp_path / "run" / "tensorboard") as board:
        runs = board.wait_for_profiles(3)
        (worker,) = board.get(f"{PROFILER}/workers", run=runs[0], view="Overview")
        which = {"run": runs[0], "worker": worker, "span": "1"}
        table = board.get(f"{PROFILER}/operation/table", **which, group_by="Operation")
        rows = {row["name"]: row for row in table["data"]}
        assert {"forward", "backward", "optimizer", "aflora.observe"} <= set(rows)
        assert rows["forward"]["host_total_duration"] > 0
        overview = board.get(f"{PROFILER}/overview", **which)
        assert len(overview["steps"]["rows"]) == 1
        if device == "cuda":
            assert rows["forward"]["device_total_duration"] > 0
            assert rows["backward"]["device_total_duration"] > 0
            shares = {child["name"]: child["value"] for child in overview["performance"][0]["children"]}
            assert shares["Kernel"] > 0
            assert "Kernel" in board.get(f"{PROFILER}/views", run=runs[0])


def test_a_snapshot_of_memory_lies_beside_the_trace_of_the_freeze(
    device: str, arguments: list[str], tmp_path: Path
) -> None:
    from aflora_dist.training.run import main

    assert main([*arguments, "--profile", "--profile.steps", "1", "--profile.memory", "true"]) == 0
    found = sorted((tmp_path / "run").rglob("*.memory.pickle"))
    assert [file.parent.name for file in found] == (["2_middle"] if device == "cuda" else [])
    for file in found:
        snapshot = pickle.loads(file.read_bytes())
        assert snapshot["segments"], "what is allocated now"
        events = [event for trace in snapshot["device_traces"] for event in trace]
        assert {"alloc", "free_completed"} <= {event["action"] for event in events}
        assert len(events) <= 100_000
        names = {frame["filename"] for event in events for frame in event.get("frames", [])}
        assert any("aflora_dist" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_with_the_triton_kernels_a_layer_computes_the_same(dtype: torch.dtype, device: str) -> None:
    if not kernels.available():
        pytest.skip("needs triton and a CUDA device, or its interpreter (TRITON_INTERPRET=1)")
    x = torch.randn(70, 2048, device=device, dtype=dtype)
    seen = []
    for use in (nullcontext, kernels.used):
        model = adapted(device, dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("s_b"):
                    parameter.fill_(0.5)  # at its start of 0 the path gives nothing
        with use():
            y = model(x)
            y.float().square().mean().backward()
        gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        seen.append({"y": y.detach().double(), **gradients})
    room = 1e-5 if dtype == torch.float32 else 3e-2
    for name, plain in seen[0].items():
        assert (seen[1][name] - plain).norm() <= room * plain.norm(), name
