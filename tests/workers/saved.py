"""accelerator.save_state in one training, load_state in the next one of the same process, on any engine.

Each training is made, trained and freed; prints as JSON what of them was equal, and whether the first was freed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from aflora_dist import AdaptiveFreezing, FreezingConfig
from tests.workers.tiny import GLOBAL_BATCH, build_model, build_optimizer, global_batch

STEPS = 12
CONFIG = FreezingConfig(total_steps=STEPS, initial_steps=2, final_steps=3)


class Training:
    """The tiny model under whatever engine this process was launched with."""

    def __init__(self, accelerator: Accelerator, groups: str) -> None:
        self.accelerator = accelerator
        model = build_model()
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, groups))
        self.freezing = AdaptiveFreezing(accelerator, self.model, self.optimizer, CONFIG)
        self.losses: list[float] = []

    def train(self, start: int, stop: int) -> None:
        self.model.train()
        share = GLOBAL_BATCH // self.accelerator.num_processes
        for step in range(start, stop):
            batch = {k: v[self.accelerator.process_index * share :][:share] for k, v in global_batch(step).items()}
            loss = self.model(**batch).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def log(self) -> list[Any]:
        return [(event.step, event.frozen, event.scores) for event in self.freezing.events]

    def weights(self) -> dict[str, torch.Tensor]:
        engine = self.freezing.engine
        return engine.values([n for n in engine.parameters if ".aflora." in n or "modules_to_save" in n])

    def free(self) -> None:
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--after", type=int, nargs="+", default=[2, 6, STEPS])
    parser.add_argument("--groups", default="head")
    args = parser.parse_args(arguments)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    several = {"kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]} if "WORLD_SIZE" in os.environ else {}
    accelerator = Accelerator(**several, **({"cpu": True} if fsdp else {}))
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = GLOBAL_BATCH // accelerator.num_processes
    first = Training(accelerator, args.groups)
    for start, stop in zip([0, *args.after], [*args.after, STEPS], strict=True):
        first.train(start, stop)
        if stop in args.after:
            accelerator.save_state(str(args.folder / str(stop)))
    kind, losses, log, weights = first.freezing.engine.kind, first.losses, first.log(), first.weights()
    gone = [weakref.ref(thing) for thing in (first.freezing, first.freezing.engine, first.model)]
    first.free()
    del first
    gc.collect()
    found = {"kind": kind, "freed": [reference() is None for reference in gone], "events": len(log), "equal": []}
    for after in args.after:
        again = Training(accelerator, args.groups)
        accelerator.load_state(str(args.folder / str(after)))
        step = again.freezing.step
        again.train(after, STEPS)
        mine = again.weights()
        found["equal"].append(
            {
                "step": step == after,
                "losses": again.losses == losses[after:],
                "log": again.log() == log,
                "weights": all(torch.equal(mine[name], weights[name]) for name in weights),
            }
        )
        again.free()
        del again, mine
        gc.collect()
    print(f"\nSAVED {json.dumps(found)}\n", end="", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
