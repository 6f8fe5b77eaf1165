"""The snippets of a page as they are written, on the engine that this process was launched with.

    accelerate launch ... tests/workers/page.py PAGE MODEL FOLDER

They find FOLDER as the working directory. What every rank has trained goes to FOLDER/values.pt, whole, by name.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingCallback
from tests.pages import classifier, snippets, with_trl
from tests.workers.trainer import arguments_of


def found_before(page: str, model: Path) -> dict[str, Any]:
    """What the snippets find before them."""
    several = {"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}
    if page == "trainer.md":
        return with_trl(model, arguments_of, **several)
    if several:  # ranks on CPUs know of each other before the page makes its accelerator, which looks for GPUs
        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    return classifier(model)


def other_ways(freezing: AdaptiveFreezing) -> dict[str, str]:
    """What comes on this rank of PEFT's own save_pretrained, over adapter/; "is_main_process" is accelerate's idiom."""
    accelerator, model = freezing.engine.accelerator, freezing.engine.model
    gathers = freezing.engine.kind != "zero3"  # which gathers the base model if it is told to
    whole = {"state_dict": accelerator.get_state_dict(accelerator._models[-1])} if gathers else {}
    alone = {"is_main_process": accelerator.is_main_process}
    chosen: dict[str, dict[str, Any]] = {"bare": {}, "gathered": whole, "is_main_process": whole | alone}
    came: dict[str, str] = {}
    for way, options in chosen.items():
        try:
            model.save_pretrained(way, save_embedding_layers=False, **options)
            came[way] = "saved"
        except AFLoRAError:
            came[way] = "refused"
    return came


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    os.chdir(args.folder)
    os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)  # profiling/fsdp_on_cpu.py's; launch/fsdp2.yaml sets none
    names = found_before(args.page.name, args.model)
    for block in snippets(args.page):
        if block.remark != "run: on its own":
            exec(compile(block.code, str(args.page), "exec"), names)
    callbacks = names["trainer"].callback_handler.callbacks if "trainer" in names else []
    (freezing,) = [c.freezing for c in callbacks if isinstance(c, FreezingCallback)] or [names["freezing"]]
    engine = freezing.engine
    adapter = [name for name in engine.parameters if ".aflora." in name or ".modules_to_save." in name]
    values = {name: value.cpu() for name, value in engine.values(adapter).items()}
    # (Of an empty state dict without a head, which every rank needs, PEFT itself makes a KeyError.)
    ways = gather_object([other_ways(freezing)]) if callbacks else []
    if engine.rank == 0:
        torch.save({"ways": ways, "kind": engine.kind, "ranks": engine.world_size, "values": values}, "values.pt")


if __name__ == "__main__":
    main()
