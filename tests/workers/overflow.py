"""fp16 with DeepSpeed's dynamic loss scaling, and one update that overflows."""

import json

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.accelerator import get_accelerator

from aflora_dist import AdaptiveFreezing, FreezingConfig
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch

# DeepSpeed asks for fast fp16; slow fp16 computes the same.
get_accelerator().is_fp16_supported = lambda: True
get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16]

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
share = GLOBAL_BATCH // accelerator.num_processes
accelerator.state.deepspeed_plugin.deepspeed_config |= {
    "train_micro_batch_size_per_gpu": share,
    "gradient_clipping": 0.05,
    "fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 3},  # the scale grows at update 2
}
model = build_model()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
freezing = AdaptiveFreezing(
    accelerator, model, optimizer, FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)
)
steps, frozen = [], []
for number in range(12):
    batch = {k: v[accelerator.process_index * share :][:share] for k, v in global_batch(number).items()}
    accelerator.backward(model(**batch).loss * (float("inf") if number == 4 else 1.0))
    optimizer.step()
    optimizer.zero_grad()
    steps.append(freezing.step)
    frozen.append(len(freezing.frozen))
if accelerator.is_main_process:
    event = freezing.events[0]
    found = {"steps": steps, "step": event.step, "frozen": event.frozen, "scores": event.scores}
    print("RESULT " + json.dumps(found | {"skipped": freezing.progress.skipped, "frozen_counts": frozen}))
accelerator.end_training()
