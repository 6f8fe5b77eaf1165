"""The main job, in which something happens to one rank as it begins an update.

struck.py WHAT RANK UPDATE ARGUMENT ...

WHAT is the name of a signal that this process gets, or "stop", which leaves a file of that name in the run's directory.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch import Tensor, nn

from aflora_dist.tasks.batches import Batch
from aflora_dist.tasks.classification import Classification
from aflora_dist.training.run import leave
from aflora_dist.training.run import main as train


def main(arguments: list[str]) -> int:
    what, rank, update, *job = arguments
    original, updates = Classification.loss, [0]

    def loss(self: Classification, model: nn.Module, batch: Batch) -> Tensor:
        updates[0] += model.training
        if model.training and updates[0] == int(update) and os.environ.get("RANK", "0") == rank:
            if what == "stop":
                (Path(self.config.run.dir) / "stop").touch()
            else:
                os.kill(os.getpid(), signal.Signals[what])
        return original(self, model, batch)

    Classification.loss = loss  # type: ignore[method-assign]
    return train(job)


if __name__ == "__main__":
    sys.exit(leave(main(sys.argv[1:])))
