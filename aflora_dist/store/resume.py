"""Taking up a training where a checkpoint left it, and leaving such checkpoints."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .. import __version__
from ..control import AdaptiveFreezing
from ..errors import AFLoRAError, writing
from ..processes import on_main
from . import checkpoint
from .checkpoint import Checkpoint
from ..watch.log import TrainingLog
from .rundir import GoingOn, RunDirectory

# What may differ between a run and its continuation: it changes neither the model nor the batches.
_FREE = {
    "preset",
    "run",
    "profile",
    "data.path",
    "data.train_file",
    "data.validation_file",
    "train.accumulation",
    "train.eval_batch_size",
    "train.gradient_checkpointing",
}


def find(run: RunDirectory, resolved: str, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint that run.resume asks for; None: start from the beginning. A collective.

    Raises:
        AFLoRAError: On every rank: it is damaged, or of a run with another configuration.
    """
    if run.config.resume is None:
        return None
    loaded: Checkpoint | None = None

    def choose() -> Path | None:
        nonlocal loaded
        loaded = _choose(run)
        return loaded.path if loaded else None

    path = on_main(accelerator, choose)
    if path is None:
        return None
    complaint = None
    if loaded is None:  # the other ranks
        try:
            loaded = checkpoint.load(path)
        except (AFLoRAError, OSError) as error:
            complaint = f"Rank {accelerator.process_index} cannot read {path}: {error}"
    complaints = [c for c in gather_object([complaint]) if c is not None]
    if complaints or loaded is None:
        raise AFLoRAError(complaints[0])
    refuse_differences(loaded.training["config"], yaml.safe_load(resolved), str(path))
    return loaded


def finished(run: RunDirectory, resolved: str) -> dict[str, Any] | None:
    """The result of the run, if it has ended already and its last checkpoint is to be resumed. A collective.

    Raises:
        AFLoRAError: It ended with another configuration.
    """

    def look() -> dict[str, Any] | None:
        if run.config.resume != "last" or not (run.path / "result.json").exists():
            return None
        config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        refuse_differences(config, yaml.safe_load(resolved), str(run.path))
        return json.loads((run.path / "result.json").read_text(encoding="utf-8"))

    return on_main(run.accelerator, look)


def _choose(run: RunDirectory) -> Checkpoint | None:
    assert run.config.resume is not None
    if run.config.resume != "last":
        path = Path(run.config.resume)
        if not path.is_dir():
            raise AFLoRAError(f"run.resume={path} is not a checkpoint's folder.")
        return checkpoint.load(path)
    newest, complaints = checkpoint.newest_good(run.checkpoints)
    for complaint in complaints:
        instead = f"Going on from {newest.path.name}" if newest else "There is no other: starting from the beginning"
        print(f"aflora: warning: {complaint} {instead}.", flush=True)
    return newest


def refuse_differences(theirs: Mapping[str, Any], mine: Mapping[str, Any], where: str) -> None:
    """Raise unless both configurations train the same model on the same batches.

    Raises:
        AFLoRAError: Names every option that differs, with both values.
    """
    flat = [_flatten(theirs), _flatten(mine)]
    different = [
        f"{key} is {flat[0].get(key)} there and {flat[1].get(key)} here"
        for key in sorted({*flat[0], *flat[1]})
        if flat[0].get(key) != flat[1].get(key) and key not in _FREE and key.partition(".")[0] not in _FREE
    ]
    if different:
        raise AFLoRAError(f"{where} is of a run with another configuration: {'; '.join(different)}.")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Checkpointer:
    """Saves a training's state and restores it.

    Args:
        data_digest: Tells the training data apart, see `data.digest`.
        resolved: The configuration as YAML.
    """

    def __init__(
        self,
        run: RunDirectory,
        accelerator: Accelerator,
        freezing: AdaptiveFreezing,
        scheduler: LambdaLR,
        data_digest: str,
        resolved: str,
    ) -> None:
        self.run, self.accelerator, self.freezing, self.scheduler = run, accelerator, freezing, scheduler
        self.data_digest, self.resolved = data_digest, resolved
        self._randomness: dict[str, Tensor] | None = None

    def save(self, log: TrainingLog, evaluations: list[dict[str, float]]) -> None:
        """Write a checkpoint after log.step updates. A collective.

        Raises:
            AFLoRAError: On every rank, if it cannot be written; those before it are unharmed.
        """
        began = time.perf_counter()
        tensors, record = self.freezing.state_dict()
        for rank, states in enumerate(gather_object([_random_states()])):
            tensors |= {f"rng/{rank}/{name}": state for name, state in states.items()}
        training = {
            "adaptive": record,
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "log": log.state(),
            "evaluations": evaluations,
            "data": self.data_digest,
            "config": yaml.safe_load(self.resolved),
            "world_size": self.accelerator.num_processes,
            "versions": {"aflora_dist": __version__, **{n: version(n) for n in ("torch", "peft", "accelerate")}},
        }

        def write() -> None:
            folder, then = self.run.checkpoints, "What was saved before is unharmed; make room, then --resume."
            with writing("A checkpoint", folder, then):
                checkpoint.save(folder, log.step, tensors, training, self.run.config.keep)

        on_main(self.accelerator, write)
        self.freezing.engine.settle()
        log.save_seconds.append(time.perf_counter() - began)

    def claim(self, loaded: Checkpoint | None) -> int:
        """Make the run's directory this run's own; returns the first step to do. A collective.

        Nothing has changed in the directory until all that can be refused has been.

        Args:
            loaded: Where to go on; None: from the beginning.

        Raises:
            AFLoRAError: It is of another model, schedule, or training data; or as `RunDirectory.claim`.
        """
        if loaded is None:
            self.run.claim(self.resolved, going_on=None)
            return 0
        if loaded.training["data"] != self.data_digest:
            raise AFLoRAError(f"{loaded.path} is of a run on other training data than what was loaded now.")
        adaptive, step = loaded.training["adaptive"], loaded.training["log"]["step"]
        self.freezing.check_state_dict(adaptive)
        self.run.claim(self.resolved, going_on=GoingOn(step, adaptive["events"]))
        return step

    def restore(self, loaded: Checkpoint, log: TrainingLog) -> list[dict[str, float]]:
        """Bring everything to where the checkpoint was written; returns the evaluations so far. A collective."""
        training = loaded.training
        self.freezing.load_state_dict(loaded.tensors, training["adaptive"])
        lambdas = [None] * len(self.scheduler.base_lrs)  # functions: they are made anew, from the configuration
        self.scheduler.load_state_dict({**training["scheduler"], "lr_lambdas": lambdas})
        for group, rate in zip(self.freezing.engine.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        log.load(training["log"])
        if training["world_size"] == self.accelerator.num_processes:
            start = f"rng/{self.accelerator.process_index}/"
            self._randomness = {k.removeprefix(start): v for k, v in loaded.tensors.items() if k.startswith(start)}
        if self.run.writes:
            before = f"{training['world_size']} x {training['adaptive']['engine']}"
            print(f"Going on after step {log.step - 1}, from {loaded.path} ({before}).", flush=True)
        return list(training["evaluations"])

    def restore_randomness(self) -> None:
        """Once, when the first batch is about to be drawn: making a loader draws random numbers, too."""
        if self._randomness is not None:
            _restore_random_states(self._randomness)
            self._randomness = None


def _random_states() -> dict[str, Tensor]:
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


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
