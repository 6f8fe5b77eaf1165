"""What is asked of a training engine: gradients by fragment, a drop, and the whole state by name.

Every engine lays gradients and optimizer state out differently. The classes here hide that: fragments and
snapshots carry the names of the unwrapped model's parameters, which are the same everywhere. An engine knows
nothing of what is trained or why.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.patch import patch_method
from ..errors import AFLoRAError
from ..freezing import Fragment
from ..names import named_parameters
from ..processes import cpu_group
from .collectives import Collectives
from .optimizers import OptimizerTraits, examine, name_of_class, plain
from .transfer import Move, Piece, Placed, carry, collect, distribute

Record = dict[str, Any]


class Observer(Protocol):
    """Receives the gradients of one bucket just before the update; `weights()` gives the values."""

    def __call__(
        self, bucket: int, gradients: Sequence[Tensor], weights: Callable[[], Sequence[Tensor]], scale: Tensor | float
    ) -> None: ...


class Engine(Collectives):
    """One training engine, bound to a prepared model and optimizer.

    Args:
        accelerator: Whose `prepare()` has set the engine up.
        model: The unwrapped model; names are those of `named_parameters`, whatever wraps modules inside it.
        optimizer: The torch optimizer whose param groups the user and the scheduler see.

    Attributes:
        kind: "single", "ddp", "zero1", "zero2", "zero3" or "fsdp2".
        sharded: Whether a rank holds a part only of each parameter.
        parameters: Every parameter of the model, by name.
        traits: How the optimizer keeps its state.
        observer: Called once per bucket just before each update, if there is one. The gradients times the scale are
            those of the mean loss over the global batch, before clipping.

    Raises:
        UnsupportedEngineError: Freezing would not be exact here; the message says what to use instead.
    """

    kind: str
    sharded = False

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.parameters: dict[str, nn.Parameter] = named_parameters(model)
        self.names: dict[nn.Parameter, str] = {p: n for n, p in self.parameters.items()}
        self.observer: Observer | None = None
        self._handles: list[Callable[[], None]] = []
        # Whose parameters each param group holds, by position: groups that run empty keep their position,
        # since schedulers address them by it. A matrix that a checkpoint brings back returns to its place.
        self.members = self._grouped()
        self.traits: OptimizerTraits = examine(optimizer, self._state_device())

    # -- where in the step we are ------------------------------------------------------------

    @abstractmethod
    def watch(self, done: Callable[[bool], None]) -> None:
        """Call `observer` just before each update from now on, and `done` after each global batch.

        `done(applied)` comes after every global batch, its update applied or skipped (fp16 overflow); neither
        is called between accumulated micro-batches.
        """

    def unwatch(self) -> None:
        """Take back what `watch` installed."""
        while self._handles:
            self._handles.pop()()

    @abstractmethod
    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        """Which fragments of the named trainable parameters this rank observes, bucket by bucket.

        Over all ranks every element is in exactly one fragment. Valid until the next drop.
        """

    def bucket_devices(self) -> list[torch.device]:
        """Where the gradients of each bucket lie."""
        return [self.device]

    # -- dropping parameters -----------------------------------------------------------------

    @property
    @abstractmethod
    def trainable(self) -> list[str]:
        """Names of the parameters that the optimizer updates, param group by param group."""

    def drop(self, names: Iterable[str]) -> list[Move]:
        """End the training of these parameters: gradient, optimizer state and master weight are released. A collective.

        Survivors keep values, moments, step counts and param-group options to the bit; handles of the user's
        (model, optimizer, scheduler) stay valid.

        Returns:
            What each rank keeps or hands over of the survivors: `carry` moves what else is laid out like them.
            Only ZeRO-1 and 2 hand anything over.
        """
        gone = set(names)
        return self.select([name for name in self.trainable if name not in gone])

    @abstractmethod
    def select(self, names: Sequence[str]) -> list[Move]:
        """Train these parameters from now on, of those that the optimizer was given. A collective, as `drop`.

        One that did not train before starts without optimizer state: `restore` gives it.
        """

    def carry(self, moves: Sequence[Move], source: Placed, target: Placed) -> None:
        """Bring state that lies like the survivors' gradients where it lies after a drop. A collective."""
        carry(moves, source, target, self.comm_device)

    # -- the whole state by name, for checkpoints ----------------------------------------------

    @abstractmethod
    def pieces(self, names: Sequence[str], *, every_copy: bool) -> list[Piece]:
        """Values ("value/NAME") and moments ("moment/KEY/NAME") of trainable parameters that this rank holds.

        As many as exist; the views are read and written.

        Args:
            every_copy: Everything here; else, of what several ranks hold alike, only what the first of them holds.
        """

    @abstractmethod
    def create_state(self, names: Sequence[str], state: Mapping[str, Record]) -> None:
        """Give these parameters optimizer state as `state()` told of it, moments at zero.

        Those that it does not tell of get none: no update has reached them.
        """

    @abstractmethod
    def state(self, names: Sequence[str]) -> dict[str, Record]:
        """What the optimizer holds for each of these parameters, as JSON can hold it.

        {"moments": {"exp_avg": "float32", ...}, "scalars": {"step": 3.0}}; nothing for those without state.
        """

    def _told(self, held: Mapping[str, Any]) -> Record:
        types = {key: str(held[key].dtype).removeprefix("torch.") for key in self.traits.moments if key in held}
        return {"moments": types, "scalars": {key: plain(held[key]) for key in self.traits.scalars if key in held}}

    def synchronise(self, names: Sequence[str]) -> None:
        """Bring values that were written to master weights into the model's own weights. A collective."""

    def snapshot(self, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], Record]:
        """Copies of all that training on needs, whole, on the main process; a collective.

        Args:
            names: Only of these trainable parameters.

        Returns:
            On the main process, flat tensors in its CPU memory: "value/NAME" and "moment/KEY/NAME"; none elsewhere.
            And on every rank a record that JSON can hold.
        """
        names = self.trainable if names is None else names
        pieces = self.pieces(names, every_copy=False)
        numels = {piece_key: self.numel(name) for name in names for piece_key in self._keys(name)}
        tensors = self.collect(pieces, numels)
        record: Record = {
            "names": list(names),
            "numels": {name: self.numel(name) for name in names},
            "optimizer": type(self.optimizer).__name__,
            "state": self.state(names),
            "groups": [
                {k: plain(group[k]) for k in self.traits.group_state if k in group}
                for group in self.optimizer.param_groups
            ],
            "scaling": self.scaling(),
        }
        return tensors, record

    def restore(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Go on from a snapshot of this or another engine on any number of ranks. A collective.

        Args:
            tensors: On the main process: what `snapshot` gave there, as it is or loaded when asked for.
            record: The same on every rank.
        """
        names = set(record["names"])
        if names != set(self.trainable):
            self.select([name for group in self.members for name in group if name in names])
        self.load(tensors, record)

    def load(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """`restore` for a snapshot of some of the parameters; the others go on as they are. A collective."""
        names = record["names"]
        self.create_state(names, record["state"])
        self.fill(tensors, [key for name in names for key in self._keys(name)], self.pieces(names, every_copy=True))
        for group, changed in zip(self.optimizer.param_groups, record["groups"], strict=False):
            group.update(changed)
        self.synchronise(names)

    def _keys(self, name: str) -> list[str]:
        return [f"value/{name}", *(f"moment/{moment}/{name}" for moment in self.traits.moments)]

    def fill(self, tensors: Mapping[str, Tensor], keys: Sequence[str], pieces: Sequence[Piece]) -> None:
        """Fill pieces on every rank from whole tensors on the main process. A collective."""
        distribute(tensors, keys, pieces, self.comm_device)

    def collect(self, pieces: Sequence[Piece], numels: Mapping[str, int]) -> dict[str, Tensor]:
        """Whole tensors on the main process from every rank's pieces. A collective."""
        group = cpu_group()  # the tensors are to be in CPU memory; NCCL would take them through the GPU twice
        return collect(pieces, numels, torch.device("cpu") if group is not None else self.comm_device, group)

    def check(self, record: Record) -> None:
        """Raise an AFLoRAError if this record is of another optimizer, and `restore` cannot go on from it."""
        theirs = {key for state in record["state"].values() for key in state["moments"]}
        if theirs and theirs != set(self.traits.moments):
            raise AFLoRAError(
                f"The checkpoint is of another optimizer: {record['optimizer']} keeps {', '.join(sorted(theirs))}, "
                f"{name_of_class(self.optimizer)} keeps {', '.join(self.traits.moments) or 'nothing'}."
            )

    @torch.no_grad()
    def broken(self) -> str | None:
        """The first trainable parameter that is not finite on some rank, or whose moments are not. A collective."""
        names = self.trainable
        bad = torch.zeros(len(names), dtype=torch.int64)
        place = {key: i for i, name in enumerate(names) for key in self._keys(name)}
        for piece in self.pieces(names, every_copy=True):
            bad[place[piece.key]] |= int(not torch.isfinite(piece.data).all())
        return next((name for name, found in zip(names, self.max_over_ranks(bad).tolist(), strict=True) if found), None)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole current values of parameters, trainable or not, as copies on every rank. A collective."""
        return {name: self.parameters[name].detach().clone() for name in names}

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole current values of parameters in CPU memory of the main process; nothing elsewhere. A collective.

        One parameter after the other, so that no rank holds more than one of them besides.
        """
        found = {}
        for name in names:
            (value,) = self.values([name]).values()
            if self.rank == 0:
                found[name] = value.cpu()
        return found

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Give parameters that do not train the values that the main process holds, flat or shaped. A collective."""
        here = ((name, self._local((p := self.parameters[name]).detach()), self._offset(p)) for name in names)
        self.fill(tensors, names, [Piece(name, start, part.view(-1)) for name, part, start in here if part.numel()])

    def settle(self) -> None:
        """Drop what a resumed process would not have; called after a checkpoint, so that both go on alike."""

    @abstractmethod
    def scaling(self) -> dict[str, Any]:
        """State of the fp16 loss scale, as JSON can hold it; empty without one."""

    @abstractmethod
    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        """Go on with a loss scale that an engine of this kind gave."""

    def keep(self, names: Sequence[str]) -> None:
        """Have these parameters in all that is saved, frozen or not, from now on and after the training."""

    def end_backward_at(self, module: nn.Module | None) -> None:
        """Below this module the backward pass does not run: nothing is to be fetched for it there. None: it does."""

    def reload(self) -> None:
        """accelerate has loaded a checkpoint of its own: take note of what it replaced."""

    # -- numbers -----------------------------------------------------------------------------

    def moment_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds for trainable parameters, padding excluded."""
        pieces = self.pieces(self.trainable, every_copy=True)
        return sum(piece.data.nbytes for piece in pieces if piece.key.startswith("moment/"))

    def optimizer_state_bytes(self) -> int:
        """Bytes of the optimizer's moments over all ranks. A collective."""
        return int(self.sum_over_ranks(torch.tensor([self.moment_bytes()], dtype=torch.int64)).item())

    @property
    def trainable_params(self) -> int:
        """Elements that the optimizer updates now."""
        return sum(self.numel(name) for name in self.trainable)

    def numel(self, name: str) -> int:
        """Elements of a parameter, whole."""
        return self.parameters[name].numel()

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    # -- shared ------------------------------------------------------------------------------

    @abstractmethod
    def _grouped(self) -> list[list[str]]:
        """Names of the parameters in each param group of `optimizer`, by position."""

    def _state_device(self) -> torch.device:
        return self.device

    def _local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is laid out like a parameter of the model."""
        return tensor

    def _offset(self, parameter: nn.Parameter) -> int:
        """The first element of this rank's part of a parameter."""
        return 0

    def _patch(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._handles.append(patch_method(owner, name, replacement))
