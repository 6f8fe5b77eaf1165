"""Two trainings of one model, between which PEFT lets all of its adapter train again. Run under `accelerate launch`.

Every rank writes to OUT/rank<N>.pt what it saw with the switch in between, and without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from aflora_dist import AdaptiveFreezing
from tests.workers.anything import CONFIG, CUT, Training, create_optimizer

LOWEST = r".*layer\.0.*lora_.*"


def train_twice(switches: bool) -> dict[str, Any]:
    training = Training("lora", freezable=LOWEST)
    training.train(0, CUT)
    gone = training.freezing.engine.values([*training.freezing.frozen])
    training.freezing.release()
    model: Any = training.accelerator.unwrap_model(training.model)
    if switches:
        model.set_adapter("default")
    training.accelerator.free_memory()
    training.model, training.optimizer = training.accelerator.prepare(model, create_optimizer(model))
    training.freezing = AdaptiveFreezing(
        training.accelerator, training.model, training.optimizer, CONFIG, freezable=LOWEST
    )
    training.losses = []
    training.train(0, CONFIG.total_steps)
    engine = training.freezing.engine
    return {
        "kind": engine.kind,
        "gone": gone,
        "now": engine.values([*gone]),
        "trained": engine.trainable,
        "events": [(event.step, event.frozen) for event in training.freezing.events],
        "losses": training.losses,
    }


def main(arguments: list[str]) -> None:
    seen = {switches: train_twice(switches) for switches in (False, True)}
    torch.save(seen, Path(arguments[0]) / f"rank{os.environ.get('RANK', '0')}.pt")
