"""What the warm process imports before ranks are forked from it (tests/ranks.py): all that workers use.

Importing starts no thread and computes nothing, for neither survives a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil

import deepspeed.utils.nvtx

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
    "distutils.ccompiler",
    "distutils.sysconfig",
    "peft.utils.transformers_weight_conversion",
    "pytest",  # a forked process imports what the tests' own process was started with
    "safetensors.torch",
    "scipy.stats",
    "sklearn.metrics",
    "torch._inductor.compile_fx",
    "torch._subclasses.schema_check_mode",
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
LATER = (  # not in the oldest releases that are supported
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.utils.pin_memory",
    "torch.profiler._cupti_monitor",
)
for name in MODULES:
    importlib.import_module(name)
for name in LATER:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)

# What transformers makes once a process: a thousand regular expressions to find stored weights by.
with contextlib.suppress(ImportError):  # not in the oldest releases
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("bert")

deepspeed.utils.nvtx.enable_nvtx = False  # ranges for NVIDIA's profiler around every hook: a tenth of ZeRO-3's time

THREADS = len(os.listdir("/proc/self/task"))
gc.collect()
gc.freeze()  # collections in the ranks do not touch, and so do not copy, what is shared
