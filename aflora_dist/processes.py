"""Notices processes that were launched together but do not know of each other."""

from __future__ import annotations

import os

from accelerate.state import PartialState

from .errors import AFLoRAError


def refuse_lonely_processes() -> None:
    """Raise if the launcher started several processes that each believe to be alone.

    DeepSpeed on a CPU does that when the gloo backend was not asked for. Says nothing before an
    Accelerator exists.

    Raises:
        AFLoRAError: On every rank; the message says how to create the accelerator.
    """
    if not PartialState._shared_state:
        return
    launched, known = int(os.environ.get("WORLD_SIZE", "1")), PartialState().num_processes
    if launched != known:
        raise AFLoRAError(
            f"{launched} processes were launched, but this one knows of {known}: they would train {launched} separate "
            f'models. On CPU, create the accelerator with Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="'
            f'gloo")]), and without DeepSpeed with cpu=True.'
        )
