"""Rank 1 is killed in the middle of training."""

import os
import signal

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from aflora_dist import AdaptiveFreezing, FreezingConfig
from tests.workers.tiny import build_model, build_optimizer, global_batch

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = build_model()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
config = FreezingConfig(total_steps=10_000, initial_steps=2, final_steps=5_000)
freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
for step in range(10_000):
    if step == 5 and accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    accelerator.backward(model(**global_batch(step)).loss)
    optimizer.step()
    optimizer.zero_grad()
