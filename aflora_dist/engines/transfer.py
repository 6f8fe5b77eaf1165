"""Moving state between ranks: intervals whose owner changes, and whole tensors to and from the main process.

Knows fragments, tensors and ranks, but no engine. Everything travels in pieces of bounded size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..freezing import Fragment
from ..processes import meet, rank, world_size

CHUNK_BYTES = 64 * 2**20  # the most that one message carries

# name -> where its elements lie here: (index of the first one, 1-D view of them), in rising order
Placed = Mapping[str, Sequence[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Move:
    """Elements that rank `source` held before a drop and rank `target` holds afterwards."""

    fragment: Fragment
    source: int
    target: int


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(data)) of the flattened tensor that a snapshot calls `key`.

    Attributes:
        data: A 1-D view of them: read when a snapshot is taken, written when it is restored.
    """

    key: str
    start: int
    data: Tensor


def plan(before: Mapping[int, Iterable[Fragment]], after: Mapping[int, Iterable[Fragment]]) -> list[Move]:
    """What goes from where to where, given which rank holds which fragments before and after.

    Elements that nobody holds afterwards go nowhere. The order is the same on every rank that is told the same.
    """
    held: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for source, fragments in before.items():
        for fragment in fragments:
            held[fragment.name].append((fragment.start, fragment.start + fragment.numel, source))
    moves = []
    for target, fragments in after.items():
        for fragment in fragments:
            for start, stop, source in sorted(held[fragment.name]):
                low, high = max(start, fragment.start), min(stop, fragment.start + fragment.numel)
                if low < high:
                    moves.append(Move(Fragment(fragment.name, low, high - low), source, target))
    return moves


def place(flats: Iterable[tuple[Tensor, Iterable[tuple[Fragment, int]]]]) -> dict[str, list[tuple[int, Tensor]]]:
    """Views by name, of flat buffers with (fragment, where in the buffer it begins)."""
    placed: dict[str, list[tuple[int, Tensor]]] = {}
    for flat, spans in flats:
        for fragment, at in spans:
            placed.setdefault(fragment.name, []).append((fragment.start, flat[at : at + fragment.numel]))
    return placed


def _view(placed: Placed, fragment: Fragment) -> Tensor:
    for start, view in placed[fragment.name]:
        if start <= fragment.start and fragment.start + fragment.numel <= start + view.numel():
            return view[fragment.start - start :][: fragment.numel]
    raise AssertionError(f"{fragment} is not held here")


@torch.no_grad()
def carry(moves: Sequence[Move], source: Placed, target: Placed, device: torch.device) -> None:
    """Copy what stays on this rank and exchange what does not. A collective.

    In rounds of bounded size, in each of them a message for each pair of ranks: of a large model half may move.

    Args:
        moves: The plan, the same on every rank; what this rank does not hold or get is of no concern to it.
        source, target: Views to read and to write, of one kind of state (values, or one of Adam's moments).
        device: Where the process group takes its tensors from.
    """
    for move in moves:
        if move.source == rank() == move.target:
            _view(target, move.fragment).copy_(_view(source, move.fragment))
    for some in _rounds(moves):
        _exchange(some, source, target, device)


def _rounds(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """What changes its rank, cut so that at most CHUNK_BYTES of float32 are on their way at a time."""
    away = [move for move in moves if move.source != move.target]
    for group in _groups([move.fragment.numel for move in away], max(CHUNK_BYTES // 4, 1)):
        parts = [(away[i], Fragment(away[i].fragment.name, away[i].fragment.start + a, b - a)) for i, a, b in group]
        yield [Move(fragment, move.source, move.target) for move, fragment in parts]


def _exchange(moves: Sequence[Move], source: Placed, target: Placed, device: torch.device) -> None:
    away: dict[int, list[Tensor]] = defaultdict(list)
    home: dict[int, list[Tensor]] = defaultdict(list)
    for move in moves:
        if move.source == rank():
            away[move.target].append(_view(source, move.fragment))
        elif move.target == rank():
            home[move.source].append(_view(target, move.fragment))
    outgoing = {peer: torch.cat([view.to(device) for view in views]) for peer, views in away.items()}
    incoming = {
        peer: torch.empty(sum(view.numel() for view in views), dtype=views[0].dtype, device=device)
        for peer, views in home.items()
    }
    operations = [dist.P2POp(dist.isend, tensor, peer) for peer, tensor in outgoing.items()]
    operations += [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in incoming.items()]
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    for peer, views in home.items():
        for view, arrived in zip(views, incoming[peer].split([view.numel() for view in views]), strict=True):
            view.copy_(arrived)


class Renamed(Mapping[str, Tensor]):
    """Tensors of a mapping by other names (here -> there); none is read before it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
        self._tensors, self._keys = tensors, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return (name for name, key in self._keys.items() if key in self._tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._keys and self._keys[name] in self._tensors  # type: ignore[index]


# -- whole tensors, on the main process only ------------------------------------------------------


@torch.no_grad()
def collect(
    pieces: Sequence[Piece], numels: Mapping[str, int], device: torch.device, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Whole flat tensors by key on the main process, as copies in its CPU memory; nothing elsewhere. A collective.

    Args:
        pieces: This rank's; over all ranks every element is in exactly one.
        numels: Elements, whole, of each key that any rank may hold.
        device: Where the process group takes its tensors from.
        group: All ranks; the default group if not given.
    """
    me, ranks = rank(), world_size()
    mine = [(piece.key, piece.start, piece.data.numel(), piece.data.dtype) for piece in pieces]
    lists: list[Any] = [mine]
    if ranks > 1:
        lists = [None] * ranks
        dist.gather_object(mine, lists if me == 0 else None, group=group)
    if me != 0:
        for part in _packed([piece.data for piece in pieces]):
            _pass(dist.isend, part.to(device), 0, group)
        return {}
    dtypes = {key: dtype for spans in lists for key, _, _, dtype in spans}
    whole = {key: torch.empty(numel, dtype=dtypes[key]) for key, numel in numels.items() if key in dtypes}
    for piece in pieces:
        whole[piece.key][piece.start :][: piece.data.numel()] = piece.data
    for peer, spans in enumerate(lists[1:], 1):
        targets = [whole[key][start : start + numel] for key, start, numel, _ in spans]
        _received(targets, lambda buffer, peer=peer: _pass(dist.irecv, buffer, peer, group), device)
    return whole


@torch.no_grad()
def distribute(whole: Mapping[str, Tensor], keys: Sequence[str], pieces: Sequence[Piece], device: torch.device) -> None:
    """Fill every rank's pieces from whole tensors that the main process holds. A collective.

    Args:
        whole: On the main process; looked at nowhere else. May load its tensors as they are asked for.
        keys: Which of them are wanted, the same on every rank; what `whole` has not stays as it is.
        pieces: This rank's views to fill.
        device: Where the process group takes its tensors from.
    """
    wanted: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        wanted[piece.key].append(piece)
    index: list[Any] = [None]
    if rank() == 0:
        index = [[(key, whole[key].numel(), whole[key].dtype) for key in keys if key in whole]]
    meet()  # `whole` may have read a large file to know that
    (known,) = broadcast_object_list(index)
    for key, numel, dtype in known:
        source = whole[key].reshape(-1) if rank() == 0 else None
        step = CHUNK_BYTES // dtype.itemsize
        for low in range(0, numel, step):
            high = min(low + step, numel)
            part = (
                source[low:high].to(device) if source is not None else torch.empty(high - low, dtype=dtype).to(device)
            )
            if world_size() > 1:
                part = part.contiguous()
                dist.broadcast(part.view(torch.uint8), 0)
            for piece in wanted[key]:
                first, last = max(low, piece.start), min(high, piece.start + piece.data.numel())
                if first < last:
                    piece.data[first - piece.start : last - piece.start].copy_(part[first - low : last - low])


def _pass(direction: Any, buffer: Tensor, peer: int, group: dist.ProcessGroup | None) -> None:
    """Send or receive. Batched: by itself a message has NCCL make a communicator for this pair of ranks."""
    for request in dist.batch_isend_irecv([dist.P2POp(direction, buffer, peer, group)]):
        request.wait()


def _packed(views: Sequence[Tensor]) -> Iterator[Tensor]:
    """The views' bytes in messages of at most CHUNK_BYTES."""
    for group in _groups([view.nbytes for view in views], CHUNK_BYTES):
        yield torch.cat([views[i].contiguous().view(torch.uint8)[low:high].cpu() for i, low, high in group])


def _received(views: Sequence[Tensor], receive: Any, device: torch.device) -> None:
    """Fill CPU views with what `_packed` sends of views of the same sizes."""
    flat = [view.view(torch.uint8) for view in views]
    for group in _groups([view.numel() for view in flat], CHUNK_BYTES):
        buffer = torch.empty(sum(high - low for _, low, high in group), dtype=torch.uint8, device=device)
        receive(buffer)
        at = 0
        for i, low, high in group:
            flat[i][low:high] = buffer[at : at + high - low]
            at += high - low


def _groups(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut things of these sizes into groups of at most `most` in all: (index, first, last + 1)."""
    group: list[tuple[int, int, int]] = []
    room = most
    for i, size in enumerate(sizes):
        low = 0
        while low < size:
            high = min(size, low + room)
            group.append((i, low, high))
            room -= high - low
            low = high
            if room == 0:
                yield group
                group, room = [], most
    if group:
        yield group
