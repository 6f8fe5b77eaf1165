"""What is said at the end of a training that was shorter than its schedule was told."""

from __future__ import annotations

import sys

from ..errors import AFLoRAError
from ..notices import logger


class Ending:
    """Warns, however the end is reached. Knows nothing of the object that it speaks for, and so can outlive it.

    Args:
        total: T of the schedule.
        speaks: Whether this rank does.
    """

    def __init__(self, total: int, *, speaks: bool) -> None:
        self.total, self.speaks = total, speaks
        self.note(0, 0)

    def note(self, step: int, remaining: int) -> None:
        """So many global batches have been, and so many matrices still train."""
        self.step, self.remaining = step, remaining
        self.errors = AFLoRAError.count

    def say(self) -> None:
        failed = getattr(sys, "last_type", None) is not None or sys.exc_info()[0] is not None
        failed = failed or AFLoRAError.count > self.errors  # one of ours, be it caught, after the last batch
        if not self.remaining or self.step >= self.total or failed or not self.speaks:
            return
        logger.warning(
            f"training ended after {self.step} of the {self.total} global batches that "
            f"FreezingConfig(total_steps={self.total}) was told, with {self.remaining} matrices unfrozen. "
            f"total_steps counts updates: epochs x examples / (ranks x batch size x accumulation)."
        )
