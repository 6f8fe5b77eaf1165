"""A scheduler section in DeepSpeed's configuration, in a user's own loop: not held by the loop, and held."""

import json

from accelerate import Accelerator
from accelerate.utils import DummyScheduler, InitProcessGroupKwargs

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=3)
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
share = GLOBAL_BATCH // accelerator.num_processes
rates = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 10, "warmup_type": "linear"}
accelerator.state.deepspeed_plugin.deepspeed_config |= {
    "train_micro_batch_size_per_gpu": share,
    "scheduler": {"type": "WarmupLR", "params": rates},
}
model = build_model()
optimizer = build_optimizer(model, "head")
model, optimizer, scheduler = accelerator.prepare(model, optimizer, DummyScheduler(optimizer))
held, accelerator._schedulers = accelerator._schedulers, []  # as without the last argument
try:
    AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    said = "nothing"
except AFLoRAError as error:
    said = str(error)
accelerator._schedulers = held
freezing = AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
found = []
for number in range(12):
    batch = {k: v[accelerator.process_index * share :][:share] for k, v in global_batch(number).items()}
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    found.append([group["lr"] for group in optimizer.param_groups])
if accelerator.is_main_process:
    print("RESULT " + json.dumps({"said": said, "rates": found, "frozen": len(freezing.frozen)}))
accelerator.end_training()
