"""The main job, in which the loss of the last rank breaks at an update while the learning rate is above 1e-3.

diverging.py STEP ARGUMENT ...
"""

from __future__ import annotations

import os
import sys

from torch import Tensor, nn

from aflora_dist.tasks.batches import Batch
from aflora_dist.tasks.classification import Classification
from aflora_dist.training.run import leave
from aflora_dist.training.run import main as train


def main(arguments: list[str]) -> int:
    at, original, calls = int(arguments[0]), Classification.loss, [0]

    def loss(self: Classification, model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += model.training
        last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        breaks = last and calls[0] == at + 1 and self.config.train.learning_rate > 1e-3
        return original(self, model, batch) * (float("nan") if breaks else 1.0)

    Classification.loss = loss  # type: ignore[method-assign]
    try:
        return train(arguments[1:])
    finally:
        Classification.loss = original  # type: ignore[method-assign]


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
