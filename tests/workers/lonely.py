"""DeepSpeed on a CPU without the gloo backend: every process believes to be alone."""

from accelerate import Accelerator

from tests.workers.tiny import GLOBAL_BATCH, build_model

accelerator = Accelerator()
accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH
build_model()
