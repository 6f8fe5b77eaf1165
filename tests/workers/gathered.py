"""Writes and reads what ZeRO-3 gathers together; prints how often a parameter had another value than was written."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn

from aflora_dist.processes import launched_accelerator


def main() -> None:
    accelerator = launched_accelerator()
    settings = {"train_batch_size": accelerator.num_processes, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.float32):
        model = nn.Sequential(*(nn.Linear(33 + i, 7) for i in range(12)))
    parameters, wrong = list(model.parameters()), 0
    for value in range(1, 51):
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            if accelerator.is_main_process:
                for parameter in parameters:
                    parameter.data.fill_(value)
        with deepspeed.zero.GatheredParameters(parameters):
            wrong += sum(bool((parameter != value).any()) for parameter in parameters)
        for parameter in parameters:  # alone it is waited for by every release
            with deepspeed.zero.GatheredParameters([parameter]):
                wrong += bool((parameter != value).any())
    accelerator.print(f"{wrong} wrong")


if __name__ == "__main__":
    main()
