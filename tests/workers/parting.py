"""The main job where rank 1 fails before the first collective, at one place after the other: as on another node."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

from aflora_dist import AFLoRAError
from aflora_dist.processes import meeting
from aflora_dist.training import run

CASES = {
    "a lock": ("aflora_dist.training.compile_lock.check_locks", AFLoRAError("a lock of this node's")),
    "a device": ("aflora_dist.processes.launched._check_devices", AFLoRAError("too few GPUs")),
    "files of a model": ("transformers.AutoConfig.from_pretrained", OSError("no route to the hub")),
    "weights": ("aflora_dist.tasks.classification.load_base", KeyError("a weight")),
    "data": ("aflora_dist.tasks.classification.load_data", AFLoRAError("no such file here")),
}


def main() -> None:
    rank = int(os.environ["RANK"])
    for number, (case, (place, error)) in enumerate(CASES.items(), start=1):
        meeting._meetings = 100 * number  # rank 1 has missed some, and would have ended
        with mock.patch(place, side_effect=error) if rank == 1 else mock.patch.dict({}):
            try:
                status: Any = run.main(sys.argv[1:])
            except Exception as raised:
                status = f"{type(raised).__name__}"
        print(f"rank {rank}, {case}: {status}\n", end="", flush=True)
        print(f"{case}\n", end="", file=sys.stderr, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
