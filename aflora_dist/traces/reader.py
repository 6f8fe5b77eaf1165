"""Reads a profiler's trace: of each event what is needed is kept, the rest is dropped as soon as it is parsed."""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AFLoRAError
from .intervals import Interval

_MOST_PACKED = 200  # characters for a byte of the file, at most; traces have ten to twenty
_SMALL = 1 << 26  # characters that any file may have
_CHUNK = 1 << 20
_STRANGE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)

# The ranges of watch/traces.py, control.py and the loop; all others are operators or another library's.
_RANGES = ("forward", "backward", "optimizer")
_LOADING = "enumerate(DataLoader)"
# As torch writes them, and as watch/traces.py writes them for TensorBoard.
_LAUNCHES = ("cuda_runtime", "cuda_driver", "Runtime")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cpu_op", "user_annotation")
# A dispatched operator has a namespace. These have one and are around operators, or hand communication to a backend.
_OPERATOR = re.compile(r"(?!autograd::|torch::autograd::|c10d|_c10d)[A-Za-z_]\w*::")
_KINDS = {
    "reducescatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
    "sendrecv": "send and recv",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "scatter": "scatter",
    "gather": "gather",
    "reduce": "reduce",
}


class TraceError(AFLoRAError):
    """A file that is not a whole trace of a training; the message names it."""


@dataclass(frozen=True)
class Collective:
    """One communication on a rank.

    Attributes:
        start, end: When it was under way: a kernel of NCCL's on the device, work of gloo's on the host. Microseconds.
        asked: When the host asked for it; NaN if that was not recorded.
        elements: How many numbers this rank gave; None if not recorded.
    """

    kind: str
    start: float
    end: float
    asked: float
    elements: int | None


@dataclass
class RankTrace:
    """What one rank's file says, in microseconds of that machine's clock.

    Attributes:
        world_size: Number of ranks in the training, if the file says so.
        steps: The profiler's steps: updates with what lies between them.
        ranges: (name, start, end) of the ranges that this package and the data loader write, in the main thread.
        operators: Dispatched operators in the main thread; they overlap, for operators call operators.
        collectives: Work of NCCL on the device, of gloo on the host.
        device: Kernels and copies on the GPU, without communication; empty without a GPU.
        launched: For each piece of work on the device, communication too: when the host asked for it (NaN if that
            was not recorded), start, and duration.
    """

    rank: int
    world_size: int | None
    steps: list[Interval]
    ranges: list[tuple[str, float, float]]
    operators: list[Interval]
    collectives: list[Collective]
    device: list[Interval]
    launched: list[tuple[float, float, float]]


def rank_in_name(path: Path) -> int | None:
    """The rank that a trace's name says: HOST_RANK.*trace.json, perhaps .gz."""
    named = re.search(r"_(\d+)\.[^/]*trace\.json(\.gz)?$", path.name)
    return int(named[1]) if named else None


def read_trace(path: Path) -> RankTrace:
    """Read a trace as watch/traces.py or torch writes it, gzipped or not.

    Raises:
        TraceError: The file is cut short, is no trace, or has none of the profiler's steps in it.
    """
    text, events, what = _text(path), _Events(), ""
    if re.match(r"\s*[^{\s]", text):
        raise TraceError(f"{path} is no trace of PyTorch's: it is no JSON object.")
    try:
        said = json.loads(text, object_hook=events.take)
        what = "traceEvents"
        if any(left is not None for left in said.get("traceEvents", ())):
            raise TypeError
        what, rank, world_size = "distributedInfo", rank_in_name(path) or 0, None
        if (ranks := said.get("distributedInfo")) is not None:
            rank, world_size = int(ranks["rank"]), int(ranks["world_size"])
            if not 0 <= rank < world_size < 2**63:
                raise ValueError(rank)
    except (json.JSONDecodeError, RecursionError):
        raise TraceError(f"{path} is cut short or damaged, after {events.count:,} events.") from None
    except _STRANGE:
        what = what or f"event {events.count:,}"
        raise TraceError(f"{path} is no trace of PyTorch's: its {what} is not as it writes it.") from None
    if not events.steps:
        raise TraceError(f"{path} has no steps (ProfilerStep) in it: it is no window of a training.")
    return events.trace(rank, world_size)


def _text(path: Path) -> str:
    parts: list[str] = []
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        left = _SMALL + _MOST_PACKED * path.stat().st_size
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            while left >= 0 and (part := file.read(_CHUNK)):
                parts.append(part)
                left -= len(part)
    except (OSError, EOFError, zlib.error) as error:
        cut = isinstance(error, EOFError | zlib.error | gzip.BadGzipFile)
        reason = "cut short or damaged" if cut else getattr(error, "strerror", None) or error
        raise TraceError(f"{path} cannot be read: {reason}.") from None
    if left < 0:
        raise TraceError(f"{path} unpacks to {_MOST_PACKED} times its size and more: it is none of PyTorch's.")
    return "".join(parts)


class _Events:
    """What is kept of the events; which thread is the main one, and who launched what, is known after the last."""

    def __init__(self) -> None:
        self.count = 0
        self.steps: dict[Any, list[Interval]] = defaultdict(list)
        self.ranges: dict[Any, list[tuple[str, float, float]]] = defaultdict(list)
        self.operators: dict[Any, list[Interval]] = defaultdict(list)
        self.gloo: list[Collective] = []
        self.calls: dict[int, float] = {}
        self.device: list[Interval] = []
        self.work: list[tuple[int, float, float]] = []
        self.nccl: list[tuple[int, str, int | None]] = []

    def take(self, parsed: dict[str, Any]) -> dict[str, Any] | None:
        """An object of the file: an event becomes None, after what lasts has been noted; others stay."""
        if "ph" not in parsed:
            return parsed
        self.count += 1
        if parsed["ph"] == "X":
            self._add(parsed)
        return None

    def _add(self, event: dict[str, Any]) -> None:
        category, name = event.get("cat"), str(event["name"])
        start, duration, args = float(event["ts"]), float(event["dur"]), event.get("args", {})
        end = start + duration
        if not math.isfinite(end):
            raise ValueError(end)
        if category in _DEVICE:
            self.work.append((int(args.get("correlation", -1)), start, duration))
            if category == "kernel" and name.startswith("nccl"):
                elements = args.get("In msg nelems")
                kind = _kind(args.get("Collective name", name))
                self.nccl.append((len(self.work) - 1, kind, None if elements is None else int(elements)))
            else:
                self.device.append((start, end))
        elif category in _LAUNCHES:
            if "correlation" in args:
                self.calls[int(args["correlation"])] = start
        elif category in _HOST:
            self._add_host(name, (event["pid"], event["tid"]), start, end, args)

    def _add_host(self, name: str, thread: tuple[Any, Any], start: float, end: float, args: dict[str, Any]) -> None:
        if name.startswith("ProfilerStep#"):
            self.steps[thread].append((start, end))
        elif name.startswith("aflora.") or name in _RANGES:
            self.ranges[thread].append((name, start, end))
        elif name.startswith(_LOADING):
            self.ranges[thread].append(("data loading", start, end))
        elif name.startswith("gloo:"):
            dims = args.get("Input Dims")
            elements = None if dims is None else sum(map(_elements, dims))
            self.gloo.append(Collective(_kind(name), start, end, start, elements))
        elif _OPERATOR.match(name):
            self.operators[thread].append((start, end))

    def trace(self, rank: int, world_size: int | None) -> RankTrace:
        main = next(iter(self.steps))
        launched = [(self.calls.get(number, math.nan), start, duration) for number, start, duration in self.work]
        collectives = self.gloo
        for i, kind, elements in self.nccl:
            asked, start, duration = launched[i]
            collectives.append(Collective(kind, start, start + duration, asked, elements))
        return RankTrace(
            rank=rank,
            world_size=world_size,
            steps=sorted(self.steps[main]),
            ranges=self.ranges[main],
            operators=self.operators[main],
            collectives=collectives,
            device=self.device,
            launched=launched,
        )


def _kind(name: str) -> str:
    letters = re.sub("[^a-z]", "", name.lower())
    return next((kind for pattern, kind in _KINDS.items() if pattern in letters), name)


def _elements(dims: Any) -> int:
    """How many numbers a tensor of this shape, or a list of tensors of these shapes, holds; [] is a scalar."""
    if all(isinstance(size, int) for size in dims):
        product = 1
        for size in dims:
            product *= size
            if product >= 2**63:
                raise ValueError(product)
        return product
    return sum(_elements(inner) for inner in dims)
