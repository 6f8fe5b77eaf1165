"""A learning-rate scheduler of whatever kind as a part of what survives a restart, on any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor

from ..engines import Engine
from ..engines.optimizers import plain
from ..errors import AFLoRAError


class Scheduler:
    """Which scheduler this is, and the numbers among the param groups' options (rates, betas), which schedulers set.

    Its own state is in the record where accelerate has wrapped it (DeepSpeed's own); of any other it may not be JSON:
    who saves it elsewhere puts it there ("state") before the record is restored.
    """

    def __init__(self, scheduler: Any, engine: Engine) -> None:
        self._scheduler, self._engine = scheduler, engine
        self._wrapped = isinstance(scheduler, AcceleratedScheduler)
        self._inner = scheduler.scheduler if self._wrapped else scheduler

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {
            "name": type(self._inner).__name__,
            "state": dict(self._scheduler.state_dict()) if self._wrapped else None,
            "groups": self._engine.members,
            "options": [_numbers(group) for group in self._engine.optimizer.param_groups],
        }

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise AFLoRAError if it is of another kind of scheduler."""
        name = type(self._inner).__name__
        if record["name"] != name or record["state"] is None:
            there = record["name"] if record["state"] is not None else "no state of one (scheduler.pt is missing)"
            raise AFLoRAError(
                f"The checkpoint is of another learning-rate scheduler: {there} there and {name} here. "
                f"Resume with the scheduler that the training began with."
            )

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on with the learning rates where they were."""
        members, groups = self._engine.members, self._engine.optimizer.param_groups
        place = {name: position for position, names in enumerate(record["groups"]) for name in names}
        source = [next((place[name] for name in names if name in place), None) for names in members]
        state = dict(record["state"])
        if record["groups"] != members:
            state |= _regrouped(state, self._scheduler.state_dict(), len(record["groups"]), source)
        self._scheduler.load_state_dict(state)
        for group, at in zip(groups, source, strict=False):
            for key, value in ({} if at is None else record["options"][at]).items():
                _set(group, key, value)


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    found = {key: plain(value) for key, value in group.items() if not isinstance(value, Tensor) or value.dim() == 0}
    return {
        key: value
        for key, value in found.items()
        if is_number(value) or (isinstance(value, tuple | list) and value and all(map(is_number, value)))
    }


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    elif key in group:
        group[key] = tuple(value) if isinstance(value, list) else value


def _regrouped(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], groups: int, source: list[int | None]
) -> dict[str, Any]:
    """Lists by param group, for these param groups: DeepSpeed leaves out those that are empty from the beginning.

    Args:
        groups: How many there were.
        source: Which of them each of the present ones was.
    """
    return {
        key: [own if at is None else value[at] for own, at in zip(mine[key], source, strict=True)]
        for key, value in theirs.items()
        if isinstance(value, list) and len(value) == groups and len(mine.get(key, ())) == len(source)
    }
