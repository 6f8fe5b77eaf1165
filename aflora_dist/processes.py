"""Processes that were launched together: making them know of each other, and noticing when they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from .errors import AFLoRAError

T = TypeVar("T")


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


def launched_accelerator(**options: Any) -> Accelerator:
    """An Accelerator for whatever launcher started this process, on GPUs as on CPUs.

    Args:
        options: Further arguments of `Accelerator`.

    Raises:
        AFLoRAError: The processes do not know of each other.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    accelerator = Accelerator(
        cpu=several and on_cpu and not with_deepspeed,  # DDP wraps nothing on a CPU unless told
        # Without it DeepSpeed's processes on a CPU would not know of each other.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if several and on_cpu else [],
        **options,
    )
    refuse_lonely_processes()
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and accelerator.distributed_type != DistributedType.FSDP:
        raise AFLoRAError(
            "FSDP was asked for, but accelerate leaves it out on CPUs: every process would hold the whole model. Use "
            "launch/ddp.yaml or launch/zero3.yaml there."
        )
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, on every rank. A collective.

    Raises:
        AFLoRAError: On every rank, where `action` raised one on the main process. Any other exception is raised
            there as it is, and on the other ranks, which would else wait for a process that is gone, as an AFLoRAError.
    """
    outcome: list[Any] = [None, None]  # result, complaint
    failure: Exception | None = None
    if accelerator.is_main_process:
        outcome[0], failure = _tried(action)
        outcome[1] = _complaint(failure, "The main process")
    result, complaint = broadcast_object_list(outcome)
    _raise(failure, [complaint])
    return result


def first_on_node(action: Callable[[], T]) -> T:
    """What `action` returns, run by each node's first process before the others, which find what it has cached.

    A collective. Nobody goes on, and nobody is left waiting, when it fails on any rank.

    Raises:
        AFLoRAError: On every rank, where `action` raised one on any. Any other exception is raised there as it is, and
            on the other ranks as an AFLoRAError.
    """
    state = PartialState()
    result: Any = None
    for first in (True, False):
        failure: Exception | None = None
        if state.is_local_main_process is first:
            result, failure = _tried(action)
        _raise(failure, gather_object([_complaint(failure, f"Rank {state.process_index}")]))
    return result


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _complaint(failure: Exception | None, who: str) -> str | None:
    """What the other ranks are told."""
    if failure is None or isinstance(failure, AFLoRAError):
        return None if failure is None else str(failure)
    return f"{who} failed: {type(failure).__name__}: {failure}"


def _raise(failure: Exception | None, complaints: list[str | None]) -> None:
    """Raise this rank's own failure as it is, or what the first other one complains of."""
    if failure is not None:
        raise failure
    for complaint in complaints:
        if complaint is not None:
            raise AFLoRAError(complaint)
