"""A gloo group beside NCCL's: for CPU tensors, and for numbers that are not to wait in a GPU's queue."""

from __future__ import annotations

import json
import os
import socket

import torch.distributed as dist

from ..notices import logger
from .meeting import meet
from .ranks import world_size

_made: tuple[object, dist.ProcessGroup | None] | None = None  # beside which group, and what came of it


def cpu_group() -> dist.ProcessGroup | None:
    """All ranks, over gloo; made at the first call, which is a collective.

    None where there is none: in a single process, and where the nodes cannot reach each other by it. That is said once,
    with what to set; whoever asks then sends device tensors through the default group.
    """
    global _made
    if not dist.is_initialized() or world_size() == 1:
        return None
    if _made is None or _made[0] is not dist.group.WORLD:
        _made = (dist.group.WORLD, _make())
    return _made[1]


def _make() -> dist.ProcessGroup | None:
    if "gloo" in str(dist.get_backend()):
        return dist.group.WORLD
    group, reason = None, _unreachable([json.loads(said or "") for said in meet(json.dumps(_address()))])
    if reason is None:
        failure: str | None = None
        try:
            group = dist.new_group(backend="gloo")
        except RuntimeError as error:
            failure = f"{socket.gethostname()}: {str(error).splitlines()[0][:200]}"
        reason = next((said for said in meet(failure) if said), None)
    if reason is None:
        return group
    logger.warning(
        f"the ranks cannot talk over gloo ({reason}). What would go over it, stop requests and checkpoints, goes over "
        f"{dist.get_backend()} instead. To change that, set GLOO_SOCKET_IFNAME to the network interface between the "
        f"nodes (`ip -brief address` lists them), or have each node's host name resolve to its address there."
    )
    return None


def _address() -> tuple[str, str, str]:
    """This node, the interface that gloo is told to use, and else the address that it takes: the host name's first."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        address = ""  # gloo falls back to the loopback device
    return name, os.environ.get("GLOO_SOCKET_IFNAME", ""), address


def _unreachable(ranks: list[list[str]]) -> str | None:
    """Why the other nodes cannot reach one: gloo would try for half an hour."""
    if len({name for name, _, _ in ranks}) == 1:
        return None
    for name, interface, address in ranks:
        if not interface and (not address or address == "::1" or address.startswith("127.")):
            what = f"resolves to {address}" if address else "is not known there"
            return f"the host name {name} {what}, where no other node reaches it"
    return None
