"""Parts of a training's state that `aflora train` has besides its method's: rates, random numbers, what is held."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..control.progress import Part
from ..engines import Engine
from ..errors import AFLoRAError

_HELD = "held/"


class LearningRates(Part):
    """Where the schedule is. Its functions, and the rates that they are factors of, are those of the configuration.

    Whether they are the same is said by that: nothing is left to `check`.
    """

    def __init__(self, scheduler: LambdaLR) -> None:
        self._scheduler = scheduler

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {key: value for key, value in self._scheduler.state_dict().items() if key != "lr_lambdas"}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        scheduler = self._scheduler
        rates, factors = scheduler.base_lrs, scheduler.lr_lambdas
        scheduler.load_state_dict({**record, "lr_lambdas": [None] * len(rates)})
        scheduler.base_lrs = rates
        now = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, factors, strict=True)]
        scheduler._last_lr = list(now)
        for group, rate in zip(scheduler.optimizer.param_groups, now, strict=True):
            group["lr"] = rate


class Randomness(Part):
    """What each rank draws random numbers from ("rng/RANK/NAME"); restored on as many ranks as there were."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._restored: dict[str, Tensor] = {}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        gathered = enumerate(gather_object([_states()]))
        tensors = {f"rng/{rank}/{name}": state for rank, states in gathered for name, state in states.items()}
        return tensors if self._accelerator.is_main_process else {}, {"ranks": self._accelerator.num_processes}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Take note of this rank's, out of those that the main process has read; `settle` brings them back."""
        if record["ranks"] != self._accelerator.num_processes:
            return
        states: list[Any] = [None]
        if self._accelerator.is_main_process:
            states = [{key: tensors[key] for key in tensors if key.startswith("rng/")}]
        start = f"rng/{self._accelerator.process_index}/"
        (found,) = broadcast_object_list(states)
        self._restored = {key.removeprefix(start): state for key, state in found.items() if key.startswith(start)}

    def settle(self) -> None:
        """Once, when the first batch is about to be drawn: making a loader draws random numbers, too."""
        states, self._restored = self._restored, {}
        if not states:
            return
        torch.set_rng_state(states["torch"])
        position, has_gauss, cached = states["numpy_position"].tolist()
        keys = states["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002
        gauss = states["python_gauss"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])


class Held(Part):
    """New modules that do not train: what they are was drawn at random, and survives a restart like what is learned."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self.engine, self.names = engine, list(names)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = self.engine.gather(self.names)
        return {_HELD + name: value.clone() for name, value in values.items()}, {"names": self.names}

    def check(self, record: Mapping[str, Any]) -> None:
        if record["names"] != self.names:
            raise AFLoRAError(
                f"The checkpoint was trained with another model.train_new: there {len(record['names'])} parameters of "
                f"new modules kept their random start, here {len(self.names)}. Choose the same."
            )

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        values = {name: tensors[_HELD + name] for name in self.names if _HELD + name in tensors}
        self.engine.assign(values, self.names)


def _states() -> dict[str, Tensor]:
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that libraries draw from
    _, words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([float(number) for number in rest], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
