"""A user's loops: exact where an engine can do them, and else refused or told of, never another training in silence."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch_series
from tests.workers.loops import LOOPS

pytestmark = pytest.mark.distributed
RANKS = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}
# Engine -> loop -> what is said instead of training; where nothing is, it is one process's training.
SAID = {
    **{
        engine: {
            "two_backward_passes": "DeepSpeed has made 2 updates for one optimizer.step()",
            "clipped_otherwise": 'Write "gradient_clipping": 0.1 into its configuration',
            "frozen_within_an_accumulation": "in the midst of an accumulation",
            "with_another_model_of_the_accelerator": "is trained by an Accelerator of its own",
            "with_the_optimizer_of_another_model": "is trained by an Accelerator of its own",
            "with_a_param_group_added": "before accelerator.prepare()",
        }
        for engine in ("zero1", "zero2", "zero3")
    },
    "ddp": {
        "joined": "Give all ranks as many batches",
        "with_a_layer_switched_off_unsaid": "find_unused_parameters=True",
        "with_layers_left_out": "Expected to have finished reduction",  # as without freezing: find_unused_parameters
    },
    "fsdp2": {},
}
ONLY = {  # what others do otherwise
    "joined": ("ddp",),
    "with_an_embedding_bag": ("single", "zero3"),
    **dict.fromkeys(
        ("with_another_model_of_the_accelerator", "with_the_optimizer_of_another_model", "with_a_param_group_added"),
        ("zero1", "zero2", "zero3"),
    ),
}


@functools.cache
def run(engine: str) -> list[dict[str, Any]]:
    """What each rank saw of all loops."""
    worker, ranks = ["profiling.fsdp_on_cpu"] if engine == "fsdp2" else [], RANKS.get(engine, 1)
    known = [name for name in LOOPS if engine in ONLY.get(name, (engine,))]
    with tempfile.TemporaryDirectory() as out:
        folders = {name: Path(out) / name for name in known}
        launch_series(engine, ranks, [[*worker, "tests.workers.loops", str(folders[name]), name] for name in known])
        read = [{n: torch.load(f / f"rank{rank}.pt")[n] for n, f in folders.items()} for rank in range(ranks)]
    return read


@pytest.mark.parametrize("engine", RANKS)
def test_a_loop_is_one_process_s_training_or_is_told_why_not(engine: str) -> None:
    (single,) = run("single")
    for rank, seen in enumerate(run(engine)):
        for name, found in seen.items():
            if (said := SAID[engine].get(name)) is not None:
                assert said in found["said"] or (rank and name == "clipped_otherwise"), (name, found["said"])
                continue
            assert found["step"] == single[name]["step"]
            for key, value in single[name]["values"].items():
                torch.testing.assert_close(found["values"][key], value, rtol=0, atol=2e-5, msg=f"{name}: {key}")
