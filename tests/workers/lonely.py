"""DeepSpeed on a CPU without the gloo backend: every process believes to be alone."""

from accelerate import Accelerator

from aflora_dist import AdaptiveFreezing, FreezingConfig
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer

accelerator = Accelerator()
accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH
model = build_model()
model, optimizer = accelerator.prepare(model, build_optimizer(model, "head"))
AdaptiveFreezing(accelerator, model, optimizer, FreezingConfig(total_steps=10, initial_steps=1, final_steps=1))
