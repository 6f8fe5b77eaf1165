"""The main job on a disk that fills up: full_disk.py BYTES STEP ARGUMENTS...

No file may grow beyond BYTES, from the checkpoint of STEP on (0: from the start).
"""

import resource
import sys
from typing import Any

from aflora_dist.store import checkpoint
from aflora_dist.training import run

limit, first = int(sys.argv[1]), int(sys.argv[2])
save = checkpoint.save


def fill() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def limited(folder: Any, step: int, *rest: Any, **more: Any) -> Any:
    if step >= first:
        fill()
    return save(folder, step, *rest, **more)


checkpoint.save = limited
if first == 0:
    fill()
sys.exit(run.main(sys.argv[3:]))
