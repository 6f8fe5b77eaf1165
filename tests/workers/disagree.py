"""Ranks that were set up differently, or that come to different decisions."""

import sys

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from tests.workers.tiny import build_model, build_optimizer, global_batch

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
rank = accelerator.process_index
model = build_model()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
config = FreezingConfig(total_steps=12, initial_steps=2 + (sys.argv[1] == "config") * rank, final_steps=3)
try:
    freezing = AdaptiveFreezing(accelerator, model, optimizer, config)
    if rank == 1:  # as if a bit had flipped
        freezing.policy.next_frozen = lambda scores, count: [max(scores, key=scores.__getitem__)]  # type: ignore[method-assign]
    for step in range(12):
        accelerator.backward(model(**global_batch(step)).loss)
        optimizer.step()
        optimizer.zero_grad()
except AFLoRAError as error:
    print(f"rank {rank}: {error}\n", end="", flush=True)
    sys.exit(2)
