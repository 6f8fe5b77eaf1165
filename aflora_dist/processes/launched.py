"""Processes that were launched together: making them know of each other, and noticing when they do not."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from ..compat.accelerate import has_state
from ..compat.deepspeed import gather_completely
from ..errors import AFLoRAError, LaunchError, one_line
from ..notices import logger
from . import meeting
from .cpu_group import cpu_group
from .ranks import LAUNCHERS, launched_number, rank

T = TypeVar("T")


def refuse_lonely_processes() -> None:
    """Raise if the launcher started several processes that each believe to be alone.

    DeepSpeed on a CPU does that when the gloo backend was not asked for. Says nothing before an
    Accelerator exists.

    Raises:
        AFLoRAError: On every rank; the message says how to create the accelerator.
    """
    if not has_state():
        return
    launched, known = launched_number("WORLD_SIZE", 1), PartialState().num_processes
    if launched != known:
        raise AFLoRAError(
            f"{launched} processes were launched, but this one knows of {known}: they would train {launched} separate "
            f'models. On CPU, create the accelerator with Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="'
            f'gloo")]), and without DeepSpeed with cpu=True; of Trainer and TRL give the arguments use_cpu=True.'
        )


def launched_processes() -> int:
    """How many processes the launcher has started, by the variables that it sets for each.

    Raises:
        AFLoRAError: The variables are incomplete or lead nowhere: the process would wait for the others in vain.
        LaunchError: They contradict each other.
    """
    world, rank = launched_number("WORLD_SIZE", 1), launched_number("RANK", 0)
    local_world, local_rank = launched_number("LOCAL_WORLD_SIZE", world), launched_number("LOCAL_RANK", 0)
    for name, value, size_name, size in (
        ("RANK", rank, "WORLD_SIZE", world),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world),
    ):
        if not 0 <= value < size:
            raise LaunchError(f"{name}={value} does not fit to {size_name}={size}: ranks count from 0. {LAUNCHERS}")
    if local_world > world:
        raise LaunchError(f"LOCAL_WORLD_SIZE={local_world} is more than WORLD_SIZE={world}. {LAUNCHERS}")
    joins = bool(os.environ.get("LOCAL_RANK"))  # by which accelerate tells
    if world == 1 and not joins and not _asked("DEEPSPEED"):
        for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"):
            if (others := launched_number(name, 1)) > 1:
                raise AFLoRAError(
                    f"MPI has started {others} processes ({name}), each of which would train alone. {LAUNCHERS}"
                )
        return 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        asked = "DeepSpeed is asked for" if _asked("DEEPSPEED") else f"LOCAL_RANK={local_rank}"
        asked = f"WORLD_SIZE={world}" if world > 1 else asked
        raise AFLoRAError(
            f"{asked}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: the processes cannot "
            f"find each other. {LAUNCHERS}"
        )
    address, port = os.environ["MASTER_ADDR"], launched_number("MASTER_PORT", 0)
    if not 0 < port < 65536:
        raise AFLoRAError(f"MASTER_PORT={port} is not a port: give one from 1024 to 65535.")
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        raise AFLoRAError(
            f"MASTER_ADDR={address[:80]}, where the ranks are to meet, is not a known host "
            f"({getattr(error, 'strerror', None) or error}). Give the name or address of the node of rank 0 "
            f"(--main_process_ip)."
        ) from None
    return world


def _asked(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true", "yes")


def launched_accelerator(**options: Any) -> Accelerator:
    """An Accelerator, with these options, for whatever launcher started this process, on GPUs as on CPUs.

    Raises an AFLoRAError if the processes cannot find each other, do not know of each other, or lack devices.
    """
    several = launched_processes() > 1
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if not os.environ.get(name, "absent"):
            del os.environ[name]  # accelerate and torch would take it for a number
    on_cpu = not torch.cuda.is_available() or _means_cpu()
    _check_devices(on_cpu, options.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if on_cpu and _asked("DEEPSPEED"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # it would put batches on a GPU whatever DS_ACCELERATOR says
    try:
        meeting.meet()  # who has been refused by now says so there, and nobody waits in a collective for it
    except torch.distributed.DistError as error:
        raise AFLoRAError(_not_connected(error)) from None
    try:
        accelerator = Accelerator(
            # DDP wraps nothing on a CPU unless told; and a GPU that there is would be taken.
            cpu=(several or _means_cpu()) and on_cpu and not _asked("DEEPSPEED"),
            # Without it DeepSpeed's processes on a CPU would not know of each other.
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if several and on_cpu else [],
            **options,
        )
    except (ValueError, ImportError) as error:  # what it makes of ACCELERATE_* variables
        raise AFLoRAError(_not_set_up(error)) from None
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "Gloo connectFullMesh" not in str(error):
            raise
        raise AFLoRAError(_not_connected(error)) from None
    refuse_lonely_processes()
    if _asked("FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise AFLoRAError(
            "FSDP was asked for, but accelerate leaves it out on CPUs: every process would hold the whole model. Use "
            "launch/ddp.yaml or launch/zero3.yaml there."
        )
    if _asked("DEEPSPEED") and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise AFLoRAError(
            "DeepSpeed was asked for, but with ACCELERATE_USE_CPU accelerate leaves it out. Unset that; with "
            "DS_ACCELERATOR=cpu DeepSpeed trains on CPUs."
        )
    if _asked("DEEPSPEED"):
        gather_completely()  # before a model is loaded: what a checkpoint lacks is drawn in gathered parameters
    cpu_group()  # before time is spent
    return accelerator


def _not_set_up(error: Exception) -> str:
    """Why there is no Accelerator, from what accelerate says of it."""
    given = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
    reason = one_line(error).rstrip(".")
    return f"accelerate cannot do what the launcher asks for: {reason}. It is asked by {', '.join(given) or 'nothing'}."


def _check_devices(on_cpu: bool, precision: str) -> None:
    """Raise for more ranks than GPUs and for fp16 without one; say it where GPUs could be used and none is seen."""
    if precision.lower() not in ("no", "", "fp16", "bf16"):
        raise AFLoRAError(f"mixed precision {precision!r} is not supported: use --mixed_precision bf16, fp16 or no.")
    if on_cpu:
        if precision == "fp16" and not _asked("DEEPSPEED"):
            raise AFLoRAError("fp16 needs a GPU: on a CPU use --mixed_precision bf16, or no.")
        if not _means_cpu() and (reason := _why_no_gpu()):
            logger.warning(f"training goes on on the CPU: {reason}")
        return
    ranks = launched_number("LOCAL_WORLD_SIZE", launched_number("LOCAL_RANK", 0) + 1)
    if ranks > torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        said = "" if seen is None else f" (CUDA_VISIBLE_DEVICES={seen})"
        raise AFLoRAError(
            f"{ranks} ranks were started on this node, which has {torch.cuda.device_count()} GPUs{said}: lower "
            f"--num_processes, or show them more."
        )


def _means_cpu() -> bool:
    """Whether whoever launched this wants the CPU, GPUs or not."""
    return _asked("CPU") or os.environ.get("DS_ACCELERATOR") == "cpu"


def _why_no_gpu() -> str | None:
    """Why torch uses no GPU, and what to do; None where nothing says that there could be one."""
    meant = "Where the CPU is meant, set DS_ACCELERATOR=cpu."
    driver = nvidia_driver()
    if torch.version.cuda is None:
        if driver is None or torch.version.hip is not None:
            return None
        return (
            f"this node has an NVIDIA GPU ({driver}), but torch {torch.__version__} was built without CUDA. Install a "
            f"build with CUDA, as https://pytorch.org/get-started/locally says. {meant}"
        )
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"no GPU is seen here (CUDA_VISIBLE_DEVICES={seen!r}). {meant}"
    if driver is None:
        return f"no GPU is seen here. {meant}"
    return (
        f"this node has an NVIDIA GPU ({driver}), but torch finds none: see what nvidia-smi says; the driver may be "
        f"too old for CUDA {torch.version.cuda}. {meant}"
    )


def nvidia_driver() -> str | None:
    """What NVIDIA's driver has put on this node for a GPU; None where there is none."""
    return next((str(path) for path in sorted(Path("/dev").glob("nvidia[0-9]*"))), None) or shutil.which("nvidia-smi")


def _not_connected(error: Exception) -> str:
    """What to do where the ranks could not meet, from what torch says of it."""
    reason = str(error)
    where = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in reason or "address already in use" in reason:
        return (
            f"The ranks were to meet at {where}, but another program uses that port. Give another one "
            f"(accelerate launch --main_process_port, or MASTER_PORT, the same for all ranks)."
        )
    return (
        f"The ranks could not connect to each other at {where}: {reason.strip().splitlines()[0][:200]} See that all "
        f"were started, that this is the node of rank 0 (--main_process_ip), and that the network between them is the "
        f"right one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."
    )


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on the main process, on every rank. A collective; the others wait as long as it takes.

    Raises:
        AFLoRAError: On every rank, where `action` raised one on the main process. Any other exception is raised
            there as it is, and on the other ranks, which would else wait for a process that is gone, as an AFLoRAError.
    """
    result, failure = _tried(action) if accelerator.is_main_process else (None, None)
    _settle(failure, "The main process")
    (result,) = broadcast_object_list([result])
    return result


def first_on_node(action: Callable[[], T]) -> T:
    """What `action` returns, run by each node's first process before the others, which find what it has cached.

    A collective; the others wait as long as it takes. Nobody goes on, and nobody is left waiting, when it fails on any
    rank.

    Raises:
        AFLoRAError: On every rank, where `action` raised one on any. Any other exception is raised there as it is, and
            on the other ranks as an AFLoRAError.
    """
    goes_first = PartialState().is_local_main_process
    result: Any = None
    for first in (True, False):
        failure: Exception | None = None
        if goes_first is first:
            result, failure = _tried(action)
        _settle(failure)
    return result


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _settle(failure: Exception | None, who: str | None = None) -> None:
    """Wait for all ranks; raise this rank's own failure as it is, or what the first other one complains of."""
    heard = meeting.meet(complaint(failure, who or f"Rank {rank()}") if failure is not None else None)
    if failure is not None:
        raise failure
    for said in heard:
        if said is not None:
            raise AFLoRAError(said)


def complaint(failure: BaseException, who: str) -> str:
    """What the other ranks are told."""
    return str(failure) if isinstance(failure, AFLoRAError) else f"{who} failed: {type(failure).__name__}: {failure}"
