"""Ranks of a process group that ends whoever waits for three seconds wait longer for one of them that works."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from aflora_dist import AFLoRAError
from aflora_dist.processes import first_on_node, meeting, on_main

LIMIT, WORK = 3.0, 4.0
meeting.PATIENCE, meeting.PULSE, meeting.SILENCE = 1.0, 0.2, 3.0  # shorter than the work: who works lives
limit = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=LIMIT))
accelerator = Accelerator(cpu=True, kwargs_handlers=[limit])
rank = accelerator.process_index


def works(on: int, fails: bool = False) -> Callable[[], str]:
    def action() -> str:
        if rank == on and fails:
            raise OSError("no space")
        if rank == on:
            time.sleep(WORK)
        return "done"

    return action


def tell(what: str, call: Callable[[], Any]) -> None:
    try:
        said = call()
    except (AFLoRAError, OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"rank {rank}, {what}: {said}\n", end="", flush=True)


tell("on main", lambda: on_main(accelerator, works(0)))
tell("on main, failing", lambda: on_main(accelerator, works(0, fails=True)))
tell("first", lambda: first_on_node(works(0)))
tell("second", lambda: first_on_node(works(1)))
if rank == 1:  # as a process that is gone
    meeting._pulse[1].set()
    time.sleep(WORK)
tell("silent", meeting.meet)
if rank == 0:  # and that is how long a collective is waited for here
    time.sleep(WORK)
tell("in a collective", accelerator.wait_for_everyone)
os._exit(0)
