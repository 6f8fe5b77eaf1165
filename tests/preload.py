"""What the warm process imports before ranks are forked from it (tests/ranks.py): all that workers use.

Importing starts no thread and computes nothing, for neither survives a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil

import aflora_dist

MODULES = (
    "accelerate.commands.launch",
    "datasets",
    "deepspeed.comm.torch",
    "deepspeed.ops.adam",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.utils",
    "peft.utils.transformers_weight_conversion",
    "pytest",  # a forked process imports what the tests' own process was started with
    "safetensors.torch",
    "scipy.stats",
    "sklearn.metrics",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.profiler",
    "torch.utils.cpp_extension",
    "torch.utils.serialization.config",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    *(module.name for module in pkgutil.walk_packages(aflora_dist.__path__, "aflora_dist.")),
)
LATER = ("deepspeed.module_inject.auto_ep_layer",)  # not in the oldest releases that are supported
for name in MODULES:
    importlib.import_module(name)
for name in LATER:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)

THREADS = len(os.listdir("/proc/self/task"))
gc.collect()
gc.freeze()  # collections in the ranks do not touch, and so do not copy, what is shared
