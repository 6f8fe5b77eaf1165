"""Two ranks whose default group is taken for NCCL's: what goes over gloo beside it, and what where gloo fails."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from aflora_dist import AdaptiveFreezing, FreezingConfig
from aflora_dist.processes import launched_accelerator
from aflora_dist.watch.stopping import StopRequest
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch

cpu_group = import_module("aflora_dist.processes.cpu_group")  # its face has a function of that name
accelerator = launched_accelerator()
rank = accelerator.process_index
new_group, batched = dist.new_group, dist.batch_isend_irecv
groups: list[Any] = []
seen: list[Any] = []


def noted(operations: list[Any]) -> list[Any]:
    seen.extend((operation.group, operation.tensor.device.type) for operation in operations)
    return batched(operations)


def unbatched(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("under NCCL this makes a communicator for two ranks")


def made(**kwargs: Any) -> Any:
    groups.append(new_group(**kwargs))
    return groups[-1]


def made_but_here(**kwargs: Any) -> Any:
    group = made(**kwargs)
    if rank == 1:
        raise RuntimeError("Gloo connectFullMesh failed with 127.0.1.1\nand more")
    return group


dist.get_backend = lambda *_: "nccl"
dist.batch_isend_irecv, dist.send, dist.recv = noted, unbatched, unbatched
model = build_model().train()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
for case in ("gloo", "gloo fails", "host names"):
    cpu_group._made = None
    groups.clear()
    seen.clear()
    dist.new_group = made_but_here if case == "gloo fails" else made
    if case == "host names":
        cpu_group.socket = SimpleNamespace(
            gethostname=lambda: f"node{rank}", getaddrinfo=lambda *_: [(0, 0, 0, "", ("127.0.1.1", 0))]
        )
    freezing = AdaptiveFreezing(
        accelerator, model, optimizer, FreezingConfig(total_steps=9, initial_steps=1, final_steps=1)
    )
    share = GLOBAL_BATCH // accelerator.num_processes
    batch = {k: v[rank * share :][:share] for k, v in global_batch(0).items()}
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
    tensors, _ = freezing.progress.snapshot()
    held = {name: p for name, p in freezing.engine.parameters.items() if p.requires_grad}
    same = all(torch.equal(tensors[f"value/{n}"], p.detach().flatten()) for n, p in held.items() if rank == 0)
    stop_request = StopRequest(Path("no-such-file"), rank == 0)
    if rank == 1:
        stop_request._requested = True
    found = {
        "case": case,
        "rank": rank,
        "made": len(groups),
        "beside": cpu_group.cpu_group() is not None,
        "through it": [group is cpu_group.cpu_group() for group, _ in seen],
        "same": same,
        "stops": stop_request.agreed(),
    }
    stop_request.close()
    freezing.detach()
    print(f"SEEN {json.dumps(found)}\n", end="", flush=True)
os._exit(0)
