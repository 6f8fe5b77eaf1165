"""Where ranks wait for each other while one of them works: at the store that they met at, which nothing times out.

A collective would be ended there: by NCCL after ten minutes, by gloo after half an hour. Needs no process group.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from ..compat.torch import default_store
from ..errors import AFLoRAError
from .ranks import rank, world_size

PATIENCE = 30.0  # seconds of waiting before a line says for whom; then every ten minutes
PULSE = 30.0  # seconds after which each process says again that it lives
SILENCE = 600.0  # seconds without that after which it is taken for dead
LINGER = 5.0  # seconds that a rank that ends stays at most, so that the others learn why
GRACE = 1.0  # seconds that the others wait for the one that failed to say so: the launcher ends all when one has ended
_LENGTH = 10_000  # of what a rank can say: the store takes no large values

_own: tuple[tuple[str, ...], Any] | None = None  # a connection made before there was a process group, and its place
_ours: tuple[Any, Any] | None = None  # a store, and this attempt's part of it
_meetings = 0  # as many on every rank
_hosts: dict[int, str] = {}
_pulse: tuple[Any, threading.Event] | None = None  # which store is told that this process lives, and until when


def connect(**options: Any) -> None:
    """Find the store where the launcher says it is, unless there is a process group, which has found it.

    Raises torch's RuntimeError if it cannot be found.
    """
    global _own
    if world_size() > 1 and not dist.is_initialized() and (_own is None or _own[0] != _place()):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # As torch's own rendezvous, whose store will be the same one; but nobody is waited for yet.
        hosts = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's
        store = TCPStore(
            address, port, world_size(), is_master=hosts, wait_for_workers=False, multi_tenant=True, **options
        )
        _own = (_place(), store)


def meet(said: str | None = None) -> list[str | None]:
    """Wait until all ranks are here, however long that takes; what each of them said, rank by rank. A collective.

    A line on stderr tells for whom the ranks wait.

    Raises:
        AFLoRAError: A rank has ended before it came here (`part`), or the store's process is gone.
        RuntimeError: As `connect`.
    """
    global _meetings
    number, me = _meetings, rank()
    _meetings += 1
    if world_size() == 1:
        return [said]
    connect()
    store = _store()
    _live(store)
    try:
        store.set(f"{number}/{me}", json.dumps((socket.gethostname(), said and said[:_LENGTH])))
        if me == 0:
            found = []
            for other in range(world_size()):
                _wait(store, number, str(other), other)
                host, heard = json.loads(store.get(f"{number}/{other}"))
                _hosts[other] = host
                found.append(heard)
            for other in range(world_size()):
                store.delete_key(f"{number}/{other}")
            store.delete_key(f"{number - 1}/all")  # everybody has read it, or would not be here
            store.set(f"{number}/all", json.dumps(found))
        else:
            _wait(store, number, "all", 0)
            found = json.loads(store.get(f"{number}/all"))
        if any(found):
            _linger(store, f"{number}/read")
            if not said:
                time.sleep(GRACE)
        return found
    except dist.DistError:
        raise AFLoRAError(
            f"Rank {me} has lost the store at which the ranks meet (MASTER_ADDR={os.environ.get('MASTER_ADDR')}): "
            f"rank 0, or its launcher, has ended; what it printed tells why."
        ) from None


def part(reason: str, *, stay: bool) -> None:
    """Tell those who wait in `meet`, or will, that this rank ends and why.

    Args:
        stay: Return once they know, or a few seconds later: a launcher may end them when this rank has ended.
    """
    if world_size() == 1:
        return
    with suppress(RuntimeError):  # nobody can be told
        connect(timeout=timedelta(seconds=LINGER))
        store = _store()
        store.set(f"{_meetings}/parted", reason[:_LENGTH])
        if stay:
            _linger(store, "gone")


def _wait(store: Any, number: int, key: str, whom: int) -> None:
    """Until somebody has set a key of this meeting."""
    began = heard = now = time.monotonic()
    line, look, pause, beat = began + PATIENCE, began + PULSE, 0.001, b""
    where = f" on {_hosts[whom]}" if whom in _hosts else ""
    while not store.check([f"{number}/{key}"]):
        if store.check([f"{number}/parted"]):
            raise AFLoRAError(store.get(f"{number}/parted").decode())
        now = time.monotonic()
        if now > look:
            look = now + PULSE
            if not store.check([f"pulse/{whom}"]):
                heard = now  # it has not been here yet, and has none
            elif (latest := store.get(f"pulse/{whom}")) != beat:
                heard, beat = now, latest
            if now - heard > SILENCE:
                raise AFLoRAError(
                    f"Rank {whom}{where} has not been heard of for {SILENCE / 60:.0f} minutes: its process or its node "
                    f"is gone. Start again with --resume."
                )
        # Rank 0 sees who is missing; where it is itself the one, another rank says so.
        if now > line and (rank() == 0 or (rank() == 1 and not store.check([f"{number}/0"]))):
            line = now + 600.0
            print(
                f"aflora: rank {rank()} has waited {now - began:.0f} s for rank {whom}{where}, which reads, downloads, "
                f"tokenises or writes; it goes on as soon as that is done.",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(pause)
        pause = min(1.5 * pause, 0.25)


def _live(store: Any) -> None:
    """Have a thread say that this process lives, whatever it works at: who waits without a limit can tell."""
    global _pulse
    if _pulse is not None and _pulse[0] is store:
        return
    if _pulse is not None:
        _pulse[1].set()
    ended, me = threading.Event(), rank()

    def beat() -> None:
        for number in itertools.count():
            with suppress(RuntimeError):  # the store is gone, which the next meeting will find
                store.set(f"pulse/{me}", str(number))
            if ended.wait(PULSE):
                return

    thread = threading.Thread(target=beat, name="aflora-pulse", daemon=True)

    def end() -> None:
        ended.set()
        thread.join(timeout=1.0)

    _pulse = store, ended
    thread.start()
    atexit.register(end)  # a thread inside the store's code would abort the process as Python takes itself down


def _linger(store: Any, key: str) -> None:
    """Stay until all ranks are here: where one's end ends the others, or the store, they would not learn the reason."""
    store.add(key, 1)
    end = time.monotonic() + LINGER
    while store.add(key, 0) < world_size() and time.monotonic() < end:
        time.sleep(0.05)


def _store() -> Any:
    global _ours
    store = _own[1] if _own is not None and _own[0] == _place() else default_store()
    if _ours is None or _ours[0] is not store:
        # torchrun's outlives ranks that it starts anew (--max_restarts), and has what those before them said.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _ours = store, PrefixStore(f"aflora/{attempt}", store)
    return _ours[1]


def _place() -> tuple[str, ...]:
    return tuple(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
