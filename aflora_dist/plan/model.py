"""What of an adapted model trains, and what that takes on a launch. The model may be on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..adapter.freezable import freezable_names, refuse_all
from ..control.prefix import blocks_from_below
from ..engines import examine
from ..freezing import FreezingPolicy, Moments, fixed_scores
from ..freezing.score import averages
from ..methods import Method
from ..methods.base import FreezingMethod
from ..names import is_adapter
from ..options import ORDERS, Config
from ..training.build import create_optimizer
from . import layout
from .events import Elements, Freezes
from .launches import Launch
from .layout import FLOAT32, Trained
from .records import EnginePlan

# Bytes in state.safetensors: a rank's random states (PyTorch's, numpy's and Python's) with their entries, and what the
# entry of a tensor has in the file's header besides the parameter's name.
_RANDOM_STATES, _ENTRY = 15_600, 75


class PlannedModel:
    """What trains of a model, param group by param group, and what of it will freeze.

    Args:
        method: Its `check` has been called.
        model: As `method.adapt` gave it.
        held: Names of parameters of new modules that keep their random start.

    Attributes:
        numels: Elements of each matrix that will freeze.
        freezes, moments: When; None if none will.
        certain: Whether the schedule says how many freeze, and not the scores.
        trained: What trains at the start.
        start, head: Elements of it, and of what trains whole beside the method.
        learning_rates: Peaks: "adapter", "head".
    """

    def __init__(self, config: Config, method: Method, model: Any, held: Sequence[str] = ()) -> None:
        named = list(model.named_parameters())
        names = {id(parameter): name for name, parameter in named}
        positions = {name: i for i, (name, _) in enumerate(named)}
        optimizer = create_optimizer(config, model, method)
        groups = optimizer.param_groups
        members = [(names[id(p)], p, i) for i, group in enumerate(groups) for p in group["params"]]
        freezing = method.freezing if isinstance(method, FreezingMethod) else None
        may = freezable_names(model, config.freezing.freezable) if freezing else set()
        self.numels = {name: p.numel() for name, p in named if name in may and p.requires_grad}
        # What an order or one number for a matrix keeps is not worth counting.
        per_element = 0
        if freezing and freezing.score not in ORDERS and freezing.granularity == "element":
            per_element = len(averages(freezing.window, freezing.score))
        self.policy = FreezingPolicy(list(self.numels), unit=freezing.unit if freezing else "matrix")
        schedule = freezing.schedule() if freezing and self.numels else None
        self.trained = Trained.of(
            [(p, group, positions[name], name in self.numels) for name, p, group in members],
            averages=per_element,
            moments=len(examine(optimizer, torch.device("cpu")).moments),
        )
        self.start = int(self.trained.numels.sum())
        self.freezes: Freezes | None = None
        self.moments: Moments | None = None
        if freezing and schedule:
            refuse_all(self.numels, [name for name, _, _ in members], freezing)
            order, prefix, blocks = None, None, list[dict[str, int]]()
            if freezing.score in ORDERS:
                order = self.policy.ranked(fixed_scores(freezing.score, self.numels, freezing.seed or 0))
            if freezing.prefix:
                sizes = {name: p.numel() for name, p, _ in members}
                below = blocks_from_below(model, sizes, self.numels, freezing)
                prefix, blocks = freezing.prefix_schedule(), [{n: sizes[n] for n in block} for block in below]
            self.moments = freezing.moments(len(self.policy), len(blocks))
            self.freezes = Freezes(schedule, self.policy, self.numels, self.start, order, prefix, blocks)
        self.certain = freezing is None or not self.freezes or freezing.rule == "rank"
        self.head = sum(p.numel() for name, p, _ in members if method.is_head(name))
        self.learning_rates: dict[str, float] = {}
        for group in groups:  # the first is the matrices'; vectors and LoRA+'s B may have another rate
            part = "head" if method.is_head(names[id(group["params"][0])]) else "adapter"
            self.learning_rates.setdefault(part, float(group["lr"]))
        self._at = {name: i for i, (name, _, _) in enumerate(members)}
        kept = {*held}
        self._fixed = {n: p for n, p in named if n in kept or (is_adapter(n) and not p.requires_grad)}

    @property
    def average(self) -> Elements:
        """Elements that train, over the updates."""
        if self.freezes is None:
            return Elements(self.start, self.start, self.start)
        average = self.freezes.average
        if self.certain:
            return average
        return Elements(self.start - sum(self.numels.values()), average.expected, self.start)  # all at once

    @property
    def end(self) -> int:
        """Elements that train after the last freeze."""
        return self.start if self.freezes is None else round(self.freezes.end.expected)

    def on(self, launch: Launch, micro_batches: int) -> EnginePlan:
        """What it takes there."""
        engine, ranks, trained = launch.engine, launch.num_processes, self.trained
        if engine == "fsdp2" and launch.half:  # accelerate has what trains in float32 then
            trained = dataclasses.replace(trained, itemsizes=np.full_like(trained.itemsizes, FLOAT32))
        beside = self.freezes.beside if self.freezes else set()
        last = self.freezes.left if self.freezes and self.certain else set()
        frozen = trained.freezable | np.array([name in beside for name in self._at])
        left = ~frozen | np.array([name in last for name in self._at])
        return EnginePlan(
            engine=engine,
            ranks=ranks,
            precision=launch.mixed_precision,
            micro_batches=micro_batches,
            optimizer_bytes=[
                layout.moment_bytes(engine, each, ranks).tolist() for each in (trained, trained.only(left))
            ],
            score_bytes=layout.score_bytes(engine, trained, ranks).tolist(),
            checkpoint_bytes=[self._checkpoint(launch, trained, trains) for trains in (np.ones_like(left), left)],
        )

    def _checkpoint(self, launch: Launch, trained: Trained, trains: NDArray[np.bool_]) -> int:
        """Bytes: values, moments and scores of what trains, what else was drawn or learned, and random states."""
        engine, ranks = launch.engine, launch.num_processes
        names = [name for name, chosen in zip(self._at, trains, strict=True) if chosen]
        stopped = trained.only(~trains)
        trained = trained.only(trains)
        held = layout.held(engine, trained, ranks) @ layout.state_itemsizes(engine, trained) * (1 + trained.moments)
        if engine == "ddp":
            held[1:] = 0  # copies of the first rank's
        scores = layout.observed(engine, trained, ranks).sum(1) * trained.averages * FLOAT32
        cast = 2 if launch.half and engine.startswith("zero") else None
        fixed = sum(p.numel() * (cast or p.element_size()) for p in self._fixed.values())
        fixed += int((stopped.numels * (cast or stopped.itemsizes)).sum())
        scored = self.numels if trained.freezable.any() else {}
        header = sum(len(name) + _ENTRY for name in names) * (1 + trained.moments)
        header += sum(len(name) + _ENTRY for name in scored) * trained.averages
        header += sum(len(name) + _ENTRY for name in {*self._fixed, *self._at} - {*names})
        return int(held.sum() + scores.sum()) + fixed + header + ranks * _RANDOM_STATES
