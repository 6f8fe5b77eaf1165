"""FSDP2 on CPU ranks: accelerate leaves FSDP out there, so its state is told that the ranks are GPUs, over gloo.

    accelerate launch --multi_gpu --num_processes 2 -m profiling.fsdp_on_cpu MODULE [ARGUMENT ...]

prepares this and calls MODULE.main([ARGUMENT, ...]). For tests and measurements without GPUs; FSDP_* variables of the
launcher's configuration come before those below.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def pretend_gpus(**environment: str) -> None:
    """Before any Accelerator exists."""
    for name, value in {**ENVIRONMENT, **environment}.items():
        os.environ.setdefault(name, value)
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # there is no device to pin memory for
    state: Any = PartialState(cpu=True, backend="gloo")
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(arguments: list[str]) -> Any:
    if arguments[0] == "aflora_dist.training.run":
        ENVIRONMENT.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)  # it knows its model's blocks
    pretend_gpus()
    return importlib.import_module(arguments[0]).main(arguments[1:])


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.exit(status if isinstance(status, int) else 0)
