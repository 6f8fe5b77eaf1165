"""The main job in fp16 or bf16 where DeepSpeed asks for hardware that is fast at it; slow, it computes the same."""

from __future__ import annotations

import sys

import torch
from deepspeed.accelerator import get_accelerator

from aflora_dist.training import run


def main(arguments: list[str]) -> int:
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().is_bf16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
