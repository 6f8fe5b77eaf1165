"""PEFT's own benchmark (method_comparison/MetaMathQA) with freezing, for AFLoRA and for what else trains there.

    git clone https://github.com/huggingface/peft
    cp -r experiments/* peft/method_comparison/MetaMathQA/experiments/
    cd peft/method_comparison/MetaMathQA
    python .../with_freezing.py experiments/aflora/llama-3.2-3B-rank32 --clean

Their run.py does all; where an experiment's folder holds a freezing.json (options of `FreezingConfig`), its parameters
freeze by it. Results go where theirs go, so that their table has the row.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import aflora_dist  # noqa: F401  # PEFT knows AFLoRA's adapter_config.json
from aflora_dist import AdaptiveFreezing, FreezingConfig


def freezing(create: Any, options: dict[str, Any]) -> Any:
    """Their function that makes an optimizer, and freezing that watches it: nothing has to be called."""

    @functools.wraps(create)
    def create_and_freeze(model: Any, *, max_steps: int, **others: Any) -> tuple[Any, Any]:
        optimizer, scheduler = create(model, max_steps=max_steps, **others)
        accelerator = Accelerator()
        _, optimizer = accelerator.prepare(model, optimizer)
        plain = torch.nn.utils.clip_grad_norm_

        def clip(parameters: Any, max_norm: float, *more: Any, **named: Any) -> Any:
            torch.nn.utils.clip_grad_norm_ = plain  # accelerate calls it
            try:
                return accelerator.clip_grad_norm_(parameters, max_norm)
            finally:
                torch.nn.utils.clip_grad_norm_ = clip

        torch.nn.utils.clip_grad_norm_ = clip  # scores are of gradients before clipping
        AdaptiveFreezing(
            accelerator,
            model,
            optimizer,
            FreezingConfig(total_steps=max_steps, **options),
            on_freeze=lambda event: print(f"step {event.step}: {event.remaining} still train", file=sys.stderr),
        )
        return optimizer, scheduler

    return create_and_freeze


def main() -> None:
    sys.path.insert(0, os.getcwd())
    import utils  # theirs

    folders = [Path(word) for word in sys.argv[1:] if (Path(word) / "freezing.json").is_file()]
    for folder in folders:
        options = json.loads((folder / "freezing.json").read_text(encoding="utf-8"))
        utils.get_optimizer_and_scheduler = freezing(utils.get_optimizer_and_scheduler, options)
    sys.argv[0] = "run.py"
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
