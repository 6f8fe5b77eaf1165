"""A loop in which one rank fails, or in which every rank does something that freezing cannot be exact with."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezeEvent, FreezingConfig
from aflora_dist.processes import on_main
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch

how = sys.argv[1]
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
if (plugin := accelerator.state.deepspeed_plugin) is not None:
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH
rank = accelerator.process_index
model = build_model()
trained = [p for p in model.parameters() if p.requires_grad]
made = torch.optim.Adagrad(trained) if how == "Adagrad" else build_optimizer(model, "head")
model, optimizer = accelerator.prepare(model, made)
if how == "PowerSGD":
    model.register_comm_hook(PowerSGDState(None), powerSGD_hook)


def on_freeze(event: FreezeEvent) -> None:
    if how == "on_freeze" and rank == 0:
        raise OSError(28, "No space left on device")


def action() -> None:
    raise ZeroDivisionError("an oversight")


config = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)
try:
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config, on_freeze=on_freeze)
    if how == "on_main":
        on_main(accelerator, action)
    local = LocalSGD(accelerator, model, local_sgd_steps=4) if how == "local SGD" else nullcontext()
    with local:
        for step in range(12):
            loss = model(**global_batch(step)).loss
            if how == "plain backward":
                loss.backward()
            else:
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
except (AFLoRAError, OSError, ZeroDivisionError) as error:
    print(f"rank {rank}: {type(error).__name__}: {error}\n", end="", flush=True)
    time.sleep(2)  # the launcher ends all ranks when one has ended, and each is to be heard
    sys.exit(2)
