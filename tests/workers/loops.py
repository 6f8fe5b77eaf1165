"""A user's loops as they should not be, and one that DPO's reference and checkpoints make: what each comes to.

    python -m tests.workers.loops OUT LOOP ...

Every rank writes {loop: what was said, or its values and losses} to OUT/rank<N>.pt.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch.distributed.algorithms.join import Join

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from tests.workers.anything import GLOBAL_BATCH, Training, build, create_optimizer, global_batch

CONFIG = FreezingConfig(total_steps=12, initial_steps=2, final_steps=6)


def part(training: Training, step: int, micro: int = 0, micros: int = 1) -> dict[str, torch.Tensor]:
    ranks = training.accelerator.num_processes
    share = GLOBAL_BATCH // ranks // micros
    first = (micro * ranks + training.accelerator.process_index) * share
    return {key: value[first : first + share] for key, value in global_batch(step).items()}


def saved_beside_a_reference() -> Training:
    """As `FreezingCallback` saves, after DPO's reference pass has had PEFT switch all gradients on."""
    training = Training("lora", CONFIG)
    model, accelerator = training.model, training.accelerator
    for step in range(12):
        loss = model(**part(training, step)).loss
        with torch.no_grad(), accelerator.unwrap_model(model).disable_adapter():
            model(**part(training, step))
        accelerator.backward(loss)
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.freezing.progress.snapshot()
        training.freezing.engine.settle()
    return training


def frozen_within_an_accumulation() -> Training:
    training = Training("lora", CONFIG, accumulation=2)
    for step in range(4):
        for micro in range(2):
            if (step, micro) == (2, 1):
                training.freezing.freeze(sorted(training.freezing.remaining)[:4])
            with training.accelerator.accumulate(training.model):
                training.accelerator.backward(training.model(**part(training, step, micro, 2)).loss)
                training.optimizer.step()
                training.optimizer.zero_grad()
    return training


def two_backward_passes() -> Training:
    training = Training("lora", CONFIG)
    for step in range(4):
        for other in (step, step + 50):
            training.accelerator.backward(training.model(**part(training, other)).loss / 2)
        training.optimizer.step()
        training.optimizer.zero_grad()
    return training


def clipped_otherwise() -> Training:
    training = Training("lora", CONFIG, clip=1.0)
    for step in range(3):
        training.accelerator.backward(training.model(**part(training, step)).loss)
        training.accelerator.clip_grad_norm_(training.model.parameters(), 0.1)
        training.optimizer.step()
        training.optimizer.zero_grad()
    return training


def with_layers_left_out() -> Training:
    """As LayerDrop does, all ranks alike: what is not called has no gradient in that update, whatever it had before."""
    training = Training("aflora", CONFIG, momentum=True)
    for group in training.optimizer.param_groups:  # where parameters lie flat, one without a gradient has one of zero
        group |= {"momentum": 0.0, "weight_decay": 0.0}
    block, original, left_out = training.blocks[1], training.blocks[1].forward, False
    block.forward = lambda states, *args, **kwargs: states if left_out else original(states, *args, **kwargs)
    for step in range(12):
        left_out = 3 <= step < 6 or step == 8
        training.train(step, step + 1)
    return training


def with_a_layer_switched_off_for_a_while(unused: bool = True) -> Training:
    """By hand, while others freeze; on again its gradients are reduced as before."""
    training = Training("lora", CONFIG, momentum=True, unused=unused)
    for group in training.optimizer.param_groups:
        group |= {"momentum": 0.0, "weight_decay": 0.0}
    engine = training.freezing.engine
    names = [n for n in engine.parameters if "classifier" in n and n in engine.trainable]
    for step in range(12):
        for name in names if step in (3, 7) else []:  # once: what freezes meanwhile leaves them as they are
            engine.parameters[name].requires_grad_(step == 7)
        training.train(step, step + 1)
    return training


def with_a_layer_switched_off_unsaid() -> Training:
    return with_a_layer_switched_off_for_a_while(unused=False)


def recomputed_reentrantly() -> Training:
    training = Training("aflora", CONFIG, recompute="reentrantly")
    training.train(0, 12)
    return training


def evaluated_with_all_gathered() -> Training:
    """FSDP2 leaves gathered what an evaluation used, and the next step begins with it."""
    with mock.patch.dict(os.environ, {"FSDP_RESHARD_AFTER_FORWARD": "false"}):
        training = Training("aflora", CONFIG, momentum=True)
    for step in range(12):
        training.train(step, step + 1)
        training.model.eval()
        with torch.no_grad():
            training.model(**part(training, step))
    return training


def with_nothing_fetched_ahead() -> Training:
    """Of ZeRO-3, which takes what follows what in a pass for what it was in the first."""
    training = Training("aflora", CONFIG, momentum=True, shard_all=True, ahead=False)
    training.train(0, 12)
    return training


def with_an_embedding_bag() -> Training:
    """Which formats all that it holds, and under ZeRO-3 holds what leads back to it."""
    training = Training("bag", CONFIG)
    training.train(0, 4)
    return training


def with_another_model_of_the_accelerator() -> Training:
    """DeepSpeed's handle of an accelerator is its first model's."""
    training = Training("lora", CONFIG)
    training.freezing.detach()
    student = build("lora")
    prepared = training.accelerator.prepare(student, create_optimizer(student))
    AdaptiveFreezing(training.accelerator, *prepared, CONFIG)
    return training


def with_the_optimizer_of_another_model() -> Training:
    training = Training("lora", CONFIG)
    training.freezing.detach()
    student = build("lora")
    _, optimizer = Accelerator().prepare(student, create_optimizer(student))
    AdaptiveFreezing(training.accelerator, training.model, optimizer, CONFIG)
    return training


def with_a_param_group_added() -> Training:
    training = Training("lora", CONFIG)
    training.train(0, 1)
    training.freezing.engine.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    training.train(1, 2)
    return training


def joined() -> Training:
    training = Training("lora", CONFIG)
    several = training.accelerator.num_processes > 1
    with Join([training.model]) if several else contextlib.nullcontext():  # type: ignore[list-item]
        for step in range(4):
            training.accelerator.backward(training.model(**part(training, step)).loss)
            training.optimizer.step()
            training.optimizer.zero_grad()
    return training


LOOPS: dict[str, Callable[[], Training]] = {
    made.__name__: made
    for made in (
        saved_beside_a_reference,
        frozen_within_an_accumulation,
        two_backward_passes,
        clipped_otherwise,
        with_layers_left_out,
        with_a_layer_switched_off_for_a_while,
        with_a_layer_switched_off_unsaid,
        recomputed_reentrantly,
        evaluated_with_all_gathered,
        with_nothing_fetched_ahead,
        with_an_embedding_bag,
        with_another_model_of_the_accelerator,
        with_the_optimizer_of_another_model,
        with_a_param_group_added,
        joined,
    )
}


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    said, logger = io.StringIO(), logging.getLogger("aflora_dist")
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def main(arguments: list[str] | None = None) -> None:
    out, *names = sys.argv[1:] if arguments is None else arguments
    found: dict[str, Any] = {}
    for name in names:
        with listening() as said:
            try:
                training = LOOPS[name]()
                found[name] = {"values": training.values(), "step": training.freezing.step, "said": said.getvalue()}
                training.accelerator.end_training()
            except (AFLoRAError, RuntimeError) as error:
                found[name] = {"said": str(error)}
    Path(out).mkdir(exist_ok=True)
    torch.save(found, Path(out) / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
