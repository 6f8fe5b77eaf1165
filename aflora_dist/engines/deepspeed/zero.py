"""What DeepSpeed's ZeRO stages have in common."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ...compat.accelerate import optimizers
from ...compat.contract import Private, require_private
from ...compat.deepspeed import BOTH, ENGINE, divide_once, gather_completely
from ...errors import UnsupportedEngineError
from ...freezing import Fragment
from ...notices import logger
from ..base import Engine, Record
from ..optimizers import release
from ..transfer import Move, Piece, place, plan
from . import device
from .saving import KeptWhole
from .supported import CLIPS_BY_ITSELF, check_groups, check_one_update, check_supported

Span = tuple[Fragment, int]  # a fragment, and where in its partition it begins
_HANDED_ON = ("loss_scaler", "dynamic_loss_scale", "overflow", "_global_grad_norm")  # from one optimizer to the next


class ZeroEngine(Engine):
    """A DeepSpeedEngine at ZeRO stage 1, 2 or 3.

    ZeRO replaces the parameters of the inner torch optimizer by flat float32 partitions, one per param group (stage 3:
    per sub-group), and calls the inner optimizer once for each, with the partition's averaged, unscaled and clipped
    gradient, and only if the update is not skipped. A step pre-hook of it is where gradients are seen.
    """

    interfaces: Sequence[Private]  # of DeepSpeed's optimizer for this stage

    def __init__(self, accelerator: Accelerator, optimizer: Any) -> None:
        wrapper = accelerator.deepspeed_engine_wrapped
        assert wrapper is not None
        self.ds: Any = wrapper.engine
        require_private("deepspeed", self.ds, ENGINE)
        check_supported(self.ds)
        require_private("deepspeed", self.zero, [*BOTH, *self.interfaces])
        divide_once(self.ds)
        gather_completely()
        self.kind = f"zero{self.ds.zero_optimization_stage()}"
        self._wrapper = optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
        self._stand_in: Optimizer | None = None
        self._visible: list[int] = []  # positions of the param groups that the stand-in has
        self._loss_scale = 1.0
        self._stepped, self._kept = 0, False  # updates since optimizer.step() was called; gradients of the last of them
        self._told_of_clipping = False
        self._observed: list[list[Span]] = []  # per partition
        super().__init__(accelerator, self.ds.module, self.ds.basic_optimizer)

    # -- what the stages differ in -----------------------------------------------------------

    @abstractmethod
    def _group_parameters(self) -> list[tuple[int, list[nn.Parameter]]]:
        """(param group of the inner optimizer, its model parameters) for each flat partition."""

    @abstractmethod
    def _partitions(self) -> list[Tensor]:
        """The flat float32 partitions that the inner optimizer updates."""

    @abstractmethod
    def _layouts(self) -> dict[int, list[list[Span]]]:
        """rank -> partition by partition what it holds: of every rank if a drop moves anything, else of this one."""

    def _norm(self, scale: float) -> Tensor:
        """Of the gradients, as this stage clips by it with this loss scale."""
        return torch.as_tensor(self.zero._global_grad_norm)

    def _forget_gradients(self) -> None:
        """Of the last update: DeepSpeed zeroes nothing, and what the next backward pass leaves out has no gradient."""
        for kept in (flat.grad for flat in self._partitions() if flat.grad is not None):  # under optimizer offload
            kept.zero_()

    @abstractmethod
    def _replace(self, dropped: Sequence[nn.Parameter]) -> None:
        """Make a new ZeRO optimizer over the inner optimizer's params and free the old one."""

    # -- shared ------------------------------------------------------------------------------

    def _combined_scale(self) -> Tensor | float:
        """What DeepSpeed divided the loss-scaled gradient by: the loss scale times the clip factor."""
        scale = float(self.zero.loss_scale)
        if not self.zero.clip_grad:
            return scale
        return ((self._norm(scale) + 1e-6) / self.zero.clip_grad).clamp(min=1.0) * scale

    def _positions(self) -> list[int]:
        """Where each param group that ZeRO sees stands in the inner optimizer's list."""
        groups = self.optimizer.param_groups
        return [next(i for i, g in enumerate(groups) if g is group) for group in self.zero.optimizer.param_groups]

    def _grouped(self) -> list[list[str]]:
        groups: list[list[str]] = [[] for _ in self.optimizer.param_groups]
        for index, parameters in self._group_parameters():
            groups[index].extend(self.names[p] for p in parameters)
        self._groups = [list(group) for group in groups]
        return groups

    def _state_device(self) -> torch.device:
        return self._partitions()[0].device  # the CPU under optimizer offload

    @property
    def zero(self) -> Any:
        return self.ds.optimizer

    @property
    def trainable(self) -> list[str]:
        return [name for group in self._groups for name in group]

    def watch(self, done: Callable[[bool], None]) -> None:
        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            partition = next(p for group in optimizer.param_groups for p in group["params"])
            bucket = next(i for i, flat in enumerate(self._partitions()) if flat is partition)
            spans = self._observed[bucket] if self._observed else []  # none: nobody has asked for buckets
            if not spans or self.observer is None:
                return
            self.observer(
                bucket,
                [partition.grad[at : at + f.numel] for f, at in spans],
                lambda: [partition.detach()[at : at + f.numel] for f, at in spans],
                torch.as_tensor(self._combined_scale() / self._loss_scale).to(partition.device),
            )

        original_step = self.ds.step

        def step(*args: Any, **kwargs: Any) -> None:
            check_groups(self.optimizer, len(self.members))
            whole = self.ds.is_gradient_accumulation_boundary()
            # DeepSpeed adjusts its loss scale before it unscales; the gradients have this one.
            self._loss_scale = float(self.zero.loss_scale)
            original_step(*args, **kwargs)
            if whole:
                self._stepped, self._kept = self._stepped + 1, True
                done(self.ds.was_step_applied())

        self.ds.step = step
        self._handles.append(lambda: self.ds.__dict__.pop("step", None))
        self._patch(self.ds, "backward", self._backward)
        self._handles.append(self.optimizer.register_step_pre_hook(before).remove)
        if self._wrapper is not None:
            self._patch(self._wrapper, "step", self._check_stepped)
        self._patch(self.accelerator, "clip_grad_norm_", self._clip_grad_norm)

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._kept:  # until now, for who reads them after the update
            self._kept = False
            self._forget_gradients()
        return original(*args, **kwargs)

    def _check_stepped(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        updates, self._stepped = self._stepped, 0
        if updates or self.accelerator.sync_gradients:
            check_one_update(updates)
        return original(*args, **kwargs)

    def _clip_grad_norm(self, original: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        wanted = 0 if math.isinf(max_norm) else max_norm
        if (clips := float(self.zero.clip_grad or 0)) != wanted and not self._told_of_clipping:
            self._told_of_clipping = True
            logger.warning(CLIPS_BY_ITSELF.format(at=f"at {clips:g}" if clips else "not at all here", norm=max_norm))
        return original(parameters, max_norm, norm_type)

    def drop(self, names: Iterable[str]) -> list[Move]:
        if not self.accelerator.sync_gradients:
            raise UnsupportedEngineError(
                "Matrices would freeze in the midst of an accumulation, whose gradients so far DeepSpeed would lose: "
                "call freeze() after the optimizer.step() of a whole global batch."
            )
        return super().drop(names)

    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        wanted = set(names)
        self._observed = [[(f, at) for f, at in spans if f.name in wanted] for spans in self._layouts()[self.rank]]
        return [[f for f, _ in spans] for spans in self._observed]

    def bucket_devices(self) -> list[torch.device]:
        return [flat.device for flat in self._partitions()]

    # -- dropping ----------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, names: Sequence[str]) -> list[Move]:
        check_groups(self.optimizer, len(self.members))
        wanted, before = set(names), self._fragments()
        off = [p for name in self.trainable if name in wanted and not (p := self.parameters[name]).requires_grad]
        old, zero = self._let_go(), self.zero
        dropped = [self.parameters[name] for name in self.trainable if name not in wanted]
        for parameter in (self.parameters[name] for group in self.members for name in group if name not in wanted):
            release(parameter)  # those that had frozen before, too: PEFT may have switched their gradients on
        self._groups = [[name for name in group if name in wanted] for group in self.members]
        for group, members in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [self.parameters[name].requires_grad_(True) for name in members]
        with device.no_garbage_collection():
            device.synchronize()  # nothing is gathered any more out of buffers that are about to go
            with device.allocator_left_alone():
                handed_on = {name: getattr(zero, name) for name in _HANDED_ON}
                self._replace(dropped)
                for name, value in handed_on.items():
                    setattr(self.zero, name, value)
            for parameter in off:  # by the user, for a while: ZeRO takes in only what trains
                parameter.requires_grad_(False)
            self._keep_positions()
            for wrapped in optimizers(self.accelerator):
                if isinstance(wrapped, AcceleratedOptimizer) and wrapped.optimizer is zero:
                    wrapped.optimizer = self.zero
            moves = plan(before, self._fragments())
            self._take_over(old, moves)
            device.synchronize()  # DeepSpeed's own streams do not wait for what was copied on this one
        return moves

    def _fragments(self) -> dict[int, list[Fragment]]:
        return {rank: [f for spans in layout for f, _ in spans] for rank, layout in self._layouts().items()}

    def _let_go(self) -> list[tuple[int, Tensor, list[Span], dict[str, Any]]]:
        """(param group, partition, what it holds, its optimizer state) of the partitions there are now."""
        positions = [position for position, _ in self._group_parameters()]
        parts = zip(positions, self._partitions(), self._layouts()[self.rank], strict=True)
        old = [(at, flat.detach(), spans, self.optimizer.state.get(flat, {})) for at, flat, spans in parts]
        self.optimizer.state.clear()
        return old

    def _take_over(self, old: list[tuple[int, Tensor, list[Span], dict[str, Any]]], moves: Sequence[Move]) -> None:
        """Fill the new partitions and their state, one kind after the other: a shard of memory on top, no more."""
        new = list(zip(self._partitions(), self._layouts()[self.rank], strict=True))
        self.carry(moves, place((flat, spans) for _, flat, spans, _ in old), place((p.detach(), s) for p, s in new))
        states = [(position, spans, state) for position, _, spans, state in old]
        numbers = {position: {key: state[key] for key in self.traits.scalars} for position, _, state in states if state}
        del old
        held = [key for key in self.traits.moments if any(key in state for _, _, state in states)]
        fresh: list[dict[str, Any]] = [{} for _ in new]
        for key in held:
            for (flat, _), state in zip(new, fresh, strict=True):
                state[key] = torch.zeros_like(flat, requires_grad=False)
            source = place((state[key], spans) for _, spans, state in states if key in state)
            target = place((state[key], spans) for (_, spans), state in zip(new, fresh, strict=True))
            self.carry(moves, source, target)
            for _, _, state in states:
                state.pop(key, None)
            del source
        for (position, _), (flat, _), state in zip(self._group_parameters(), new, fresh, strict=True):
            if position in numbers:  # not in a group that a checkpoint brings back: it gets its state from there
                self.optimizer.state[flat] = {**copy.deepcopy(numbers[position]), **state}

    # -- state by name -----------------------------------------------------------------------

    @torch.no_grad()
    def pieces(self, names: Sequence[str], *, every_copy: bool) -> list[Piece]:
        wanted, found = set(names), []
        for flat, spans in zip(self._partitions(), self._layouts()[self.rank], strict=True):
            state = self.optimizer.state.get(flat, {})
            kinds = {"value": flat.detach()}
            kinds |= {f"moment/{key}": state[key] for key in self.traits.moments if key in state}
            for fragment, at in spans:
                if fragment.name in wanted:
                    for kind, tensor in kinds.items():
                        piece = tensor[at : at + fragment.numel]
                        found.append(Piece(f"{kind}/{fragment.name}", fragment.start, piece))
        return found

    @torch.no_grad()
    def create_state(self, names: Sequence[str], state: Mapping[str, Record]) -> None:
        wanted = set(names)
        for (_, members), flat in zip(self._group_parameters(), self._partitions(), strict=True):
            here = [self.names[p] for p in members if self.names[p] in wanted]
            told = [state[name] for name in here if name in state]
            if not told:
                if len(here) == len(members):  # no update yet
                    self.optimizer.state.pop(flat, None)
                continue
            held = self.optimizer.state.setdefault(flat, {})
            numbers = told[0]["scalars"].items()  # the partition is one tensor to the optimizer
            held |= {key: self.traits.scalar(key, number, flat.device) for key, number in numbers}
            keys = dict.fromkeys(key for each in told for key in each["moments"])
            held |= {key: torch.zeros_like(flat, requires_grad=False) for key in keys if key not in held}

    def check(self, record: Record) -> None:
        super().check(record)
        for group in self.members:
            counts = {n: record["state"].get(n, {}).get("scalars") for n in group if n in record["numels"]}
            first = next(iter(counts), "")
            if other := next((name for name in counts if counts[name] != counts[first]), None):
                raise UnsupportedEngineError(
                    f"In the checkpoint {first} and {other} have had different numbers of updates ({counts[first]} and "
                    f"{counts[other]}), and ZeRO keeps one for all of a param group. Go on with DDP or FSDP2, where a "
                    f"parameter that a batch does not use is not updated either."
                )

    def state(self, names: Sequence[str]) -> dict[str, Record]:
        wanted, found = set(names), dict[str, Record]()
        for (_, members), flat in zip(self._group_parameters(), self._partitions(), strict=True):
            if held := self.optimizer.state.get(flat):
                found |= {name: self._told(held) for p in members if (name := self.names[p]) in wanted}
        return found

    def scaling(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.zero.loss_scaler).items() if isinstance(value, int | float)}

    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        vars(self.zero.loss_scaler).update(scaling)

    def keep(self, names: Sequence[str]) -> None:
        KeptWhole(self.ds, names)

    def reload(self) -> None:
        """Loading gave the optimizer inside ZeRO a new state and new param groups: if it is a stand-in, share them."""
        if (stand_in := self.zero.optimizer) is not self.optimizer:
            self.optimizer.state = stand_in.state
            for position, group in zip(self._visible, stand_in.param_groups, strict=True):
                self.optimizer.param_groups[position] = group

    def _visible_groups(self) -> Optimizer:
        """The inner optimizer as ZeRO can take it: without the param groups that have run empty.

        The stand-in shares group dicts, state and hooks with the user's optimizer: learning rates set there are seen
        here. There is one, as long as the engine lives: an optimizer that owns native memory (CPU Adam) frees it with
        the first object to go. (Not copy.copy: torch's optimizers leave hooks and extra attributes out.)
        """
        inner = self.optimizer
        if all(group["params"] for group in inner.param_groups):
            return inner
        if self._stand_in is None:
            self._stand_in = object.__new__(type(inner))
            self._stand_in.__dict__.update(inner.__dict__)
            self._stand_in.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the original
        self._stand_in.state = inner.state
        self._visible = [i for i, group in enumerate(inner.param_groups) if group["params"]]
        self._stand_in.param_groups = [inner.param_groups[i] for i in self._visible]
        return self._stand_in

    def _keep_positions(self) -> None:
        """Have the new ZeRO optimizer show all param groups, empty ones too, to who asks for them.

        The user's handle leads to it, and schedulers address groups by position.
        """
        inner, kind = self.optimizer, type(self.zero)
        if self.zero.optimizer is not inner:
            shown = property(lambda zero: inner.param_groups)
            self.zero.__class__ = type(kind.__name__, (kind,), {"param_groups": shown})
