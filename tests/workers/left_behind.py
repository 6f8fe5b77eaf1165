"""Rank 1 is killed; rank 0 finds out in a collective, and the launcher's SIGTERM comes before it has said so."""

from __future__ import annotations

import os
import signal
import time

from accelerate import Accelerator

from aflora_dist.leaving import guarded, leave
from aflora_dist.watch.stopping import StopRequest

accelerator = Accelerator(cpu=True)


def job() -> None:
    try:
        with StopRequest(None, is_main=False) as stop_request:
            if accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            stop_request.agreed()
    except RuntimeError:
        time.sleep(1)  # the launcher looks in the meantime
        raise


leave(guarded(job, "training", "Start again with --resume."))
