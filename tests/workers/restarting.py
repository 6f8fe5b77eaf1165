"""Two ranks meet three times; at their first attempt rank 1 ends before the third, and torchrun starts both anew."""

from __future__ import annotations

import os
import time

from aflora_dist.processes import meeting

attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], meeting.rank()
for number in range(3):
    if attempt == "0" and number == 2 and rank == 1:
        meeting.part("it went wrong", stay=False)
        os._exit(1)
    if attempt == "1" and rank == 0:
        time.sleep(0.5)  # rank 1 has to wait for it
    heard = meeting.meet(f"{attempt}.{number}")
    print(f"rank {rank}, {number}: {' '.join(map(str, heard))}\n", end="", flush=True)
