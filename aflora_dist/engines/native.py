"""Plain PyTorch training: one process, DDP, and FSDP2. A drop moves no byte between ranks.

With one process and DDP every rank holds all gradients and all optimizer state; scores are sharded all the same:
each rank observes an equal share of every matrix, so that score memory and work fall with the number of ranks. With
FSDP2 a rank holds its rows of every parameter, and observes them; of several replicas (HSDP) the first observes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..compat.accelerate import unwrap
from ..contract import require
from ..errors import UnsupportedEngineError
from ..freezing import Fragment
from ..names import named_parameters
from ..notices import logger
from . import private
from .base import Engine, Observer, Record, inner_optimizer, release
from .clipping import Clipping
from .transfer import Move, Piece, plan

_LOCAL_SGD = (
    "The gradients of this update were not reduced over the ranks (model.no_sync(), as accelerate's LocalSGD does): "
    "each rank would score its own. Train without it; gradient accumulation goes through accelerator.accumulate(model)."
)
_FUSED_SCALING = private.SCALING[0].name  # by it GradScaler tells who unscales by itself


class NativeEngine(Engine):
    """What one process, DDP and FSDP2 have in common: a torch optimizer over the model's own parameters."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        require("accelerate", accelerator, private.ACCELERATOR)
        require("torch", torch.autograd.Variable, private.AUTOGRAD)
        inner = inner_optimizer(optimizer)
        wrappers = [optimizer, *accelerator._optimizers]
        self._wrapper = next(
            (w for w in wrappers if isinstance(w, AcceleratedOptimizer) and w.optimizer is inner), None
        )
        unwrapped = unwrap(accelerator, model)
        known = {id(p) for p in unwrapped.parameters()}
        unknown = sum(id(p) not in known for group in inner.param_groups for p in group["params"])
        if unknown:
            raise UnsupportedEngineError(
                f"The optimizer holds {unknown} tensors that are not parameters of the model. Create it from the PEFT "
                f"model's own parameters, before accelerator.prepare()."
            )
        if accelerator.scaler is not None and self._wrapper is None:
            raise UnsupportedEngineError(
                "Under fp16 updates can be skipped, which only the optimizer that accelerator.prepare() returned knows "
                "of: pass the optimizer to prepare(), and step it."
            )
        devices = sorted({str(p.device) for group in inner.param_groups for p in group["params"]})
        if len(devices) > 1:
            raise UnsupportedEngineError(
                f"The trained parameters are spread over {', '.join(devices)} (device_map?). "
                f"Load the model on one device, or spread it with ZeRO-3 or FSDP2."
            )
        named = named_parameters(unwrapped)
        scattered = [n for n, p in named.items() if p.requires_grad and not p.is_contiguous()]
        if scattered:
            raise UnsupportedEngineError(
                f"The trained parameter {scattered[0]} is not contiguous in memory, so it cannot be kept by element: "
                f"replace it by nn.Parameter(parameter.contiguous()) before the optimizer is created."
            )
        half = [n for n, p in named.items() if p.requires_grad and p.dtype.itemsize < 4]
        if half:
            logger.warning(
                f"{len(half)} trained parameters ({half[0]} is the first) are held in half precision: they and their "
                f"moments are updated in it here, where ZeRO keeps float32 copies, so that engines differ. Hold what "
                f"trains in float32; mixed_precision=bf16 computes in bfloat16 all the same."
            )
        self._fragments: list[Fragment] = []
        self._observed: list[nn.Parameter] = []
        self._applied = self._stepping = False
        self._originals = [(list(g["params"]), g.get("param_names")) for g in inner.param_groups]
        self._order = {name: i for i, name in enumerate(named)}
        super().__init__(accelerator, unwrapped, inner)
        self.clipping = Clipping(accelerator, lambda: self._observed)

    def _grouped(self) -> list[list[str]]:
        return [[self.names[p] for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]

    @property
    def trainable(self) -> list[str]:
        groups = self.optimizer.param_groups  # a later one may hold tensors that are not the model's
        return [self.names[p] for g in groups for p in g["params"] if p.requires_grad and p in self.names]

    # -- the step ----------------------------------------------------------------------------

    def watch(self, observe: Observer, done: Callable[[bool], None]) -> None:
        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            if any(argument is not None for argument in (*args[1:], *kwargs.values())):
                raise UnsupportedEngineError(
                    "optimizer.step(closure) computes gradients inside the update, where they cannot be scored before "
                    "it: call backward() and then optimizer.step()."
                )
            if self._wrapper is not None and not self._stepping:
                raise UnsupportedEngineError(
                    "The optimizer inside the one that accelerator.prepare() returned was stepped: step the latter, "
                    "which knows of accumulation and of updates that are skipped."
                )
            self._check_reduction()
            parameters = [self.parameters[f.name] for f in self._fragments]
            scale = self.clipping.factor(parameters)
            if not self._fragments:
                return
            observe(
                0,
                [self._piece(p, self._gradient(p), f) for p, f in zip(parameters, self._fragments, strict=True)],
                lambda: [self._piece(p, p.detach(), f) for p, f in zip(parameters, self._fragments, strict=True)],
                scale,
            )

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._applied = True
            if self._wrapper is None:
                self._done(done)

        self._announce = done
        self._handles.append(self.optimizer.register_step_pre_hook(before).remove)
        self._handles.append(self.optimizer.register_step_post_hook(after).remove)
        if self._wrapper is not None:  # it knows of updates that are skipped
            self._hang(self._wrapper, "step", self._step)
        if self.accelerator.scaler is not None and getattr(self.optimizer, _FUSED_SCALING, False):
            # A fused optimizer would unscale gradients and skip an update inside its kernel, unseen: the scaler is to
            # do both, as for all others. Where gradients are clipped it unscales them in any case.
            setattr(self.optimizer, _FUSED_SCALING, False)
            self._handles.append(lambda: setattr(self.optimizer, _FUSED_SCALING, True))
        self._hang(self._wrapper or self.optimizer, "zero_grad", self._zero_grad)
        self.clipping.watch()
        self._handles.append(self.clipping.unwatch)

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stepping = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._stepping = False
        if self.accelerator.sync_gradients:
            self._done(self._announce)
        return result

    def _zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.sync_gradients or self._wrapper is None:  # else accelerate does nothing
            self.clipping.updated()
        return original(*args, **kwargs)

    def _done(self, done: Callable[[bool], None]) -> None:
        applied, self._applied = self._applied, False
        self.clipping.updated()
        done(applied)

    def _check_reduction(self) -> None:
        """Raise UnsupportedEngineError unless the gradients of an update are the means over the ranks."""

    # -- gradients ---------------------------------------------------------------------------

    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        found = [self._fragment(name) for name in names]
        self._fragments = [fragment for fragment in found if fragment is not None]
        self._observed = [self.parameters[name] for name in names]
        self.clipping.follow()
        return [self._fragments]

    def _fragment(self, name: str) -> Fragment | None:
        """What this rank observes of a parameter."""
        raise NotImplementedError

    def _local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is laid out like a parameter."""
        return tensor

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        # A matrix outside this step's graph (an unused layer) has had no gradient: it is zero.
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def _piece(self, parameter: nn.Parameter, tensor: Tensor, fragment: Fragment) -> Tensor:
        local = self._local(tensor).reshape(-1)
        start = fragment.start - self._offset(parameter)
        return local[start : start + fragment.numel]

    def _offset(self, parameter: nn.Parameter) -> int:
        """The first element of this rank's part of a parameter."""
        return 0

    # -- dropping ----------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, names: Sequence[str]) -> list[Move]:
        wanted, observed = set(names), self._fragments
        # Parameters that never trained, and param groups that were added since, stay as they are.
        for group, members, (parameters, named) in zip(
            self.optimizer.param_groups, self.members, self._originals, strict=False
        ):
            for member in members:
                parameter = self.parameters[member]
                if member in wanted:
                    parameter.requires_grad_(True)
                elif parameter.requires_grad:
                    release(parameter)
                    self.optimizer.state.pop(parameter, None)
            gone = {id(self.parameters[member]) for member in members if member not in wanted}
            group["params"] = [p for p in parameters if id(p) not in gone]
            if named is not None:
                group["param_names"] = [n for n, p in zip(named, parameters, strict=True) if id(p) not in gone]
        self._observed = [p for p in self._observed if self.names[p] in wanted]
        self.clipping.follow()
        self._trained_set_changed()
        kept = [fragment for fragment in observed if fragment.name in wanted]
        return plan({self.rank: kept}, {self.rank: kept})

    def _trained_set_changed(self) -> None:
        """Other parameters train than before."""

    # -- state by name -----------------------------------------------------------------------

    @torch.no_grad()
    def pieces(self, names: Sequence[str], *, every_copy: bool) -> list[Piece]:
        found = []
        for name in names:
            parameter = self.parameters[name]
            state = self.optimizer.state.get(parameter, {})
            tensors = {f"value/{name}": parameter.detach()}
            tensors |= {f"moment/{key}/{name}": state[key] for key in self.traits.moments if key in state}
            for key, tensor in tensors.items():
                local = self._local(tensor)
                if local.numel() and (every_copy or self._holds_first_copy(parameter)):
                    found.append(Piece(key, self._offset(parameter), _flat(local)))
        return found

    def _holds_first_copy(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the first of those that hold the same of a parameter."""
        return True

    @torch.no_grad()
    def assign(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        found = []
        for name in names:
            parameter = self.parameters[name]
            if (local := self._local(parameter.detach())).numel():
                found.append(Piece(name, self._offset(parameter), _flat(local)))
        self.fill(tensors, names, found)

    @torch.no_grad()
    def create_state(self, names: Sequence[str], state: Mapping[str, Record]) -> None:
        for name in names:
            parameter = self.parameters[name]
            self.optimizer.state.pop(parameter, None)
            if name in state:
                numbers = state[name]["scalars"].items()
                scalars = {key: self.traits.scalar(key, number, parameter.device) for key, number in numbers}
                types = {key: getattr(torch, dtype) for key, dtype in state[name]["moments"].items()}
                moments = {key: torch.zeros_like(parameter, dtype=dtype) for key, dtype in types.items()}
                self.optimizer.state[parameter] = {**scalars, **moments}

    def state(self, names: Sequence[str]) -> dict[str, Record]:
        states = {name: self.optimizer.state.get(self.parameters[name]) for name in names}
        return {name: self._told(held) for name, held in states.items() if held}

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.parameters[name].detach().clone() for name in names}

    def scaling(self) -> dict[str, Any]:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(scaling))


class ReplicatedEngine(NativeEngine):
    """One process, or DistributedDataParallel."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        self.ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        self.kind = "ddp" if self.ddp is not None else "single"
        if self.ddp is None and self.world_size > 1:
            raise UnsupportedEngineError(
                f"There are {self.world_size} processes, but the model is not wrapped in DDP: pass the model that "
                f"accelerator.prepare() returned; on a CPU create the accelerator with Accelerator(cpu=True)."
            )
        if self.ddp is not None:
            require("torch", self.ddp, private.REDUCER)
            _check_hooks(self.ddp)
        super().__init__(accelerator, model, optimizer)

    def _check_reduction(self) -> None:
        if self.ddp is not None:
            if not self.ddp.require_backward_grad_sync:
                raise UnsupportedEngineError(_LOCAL_SGD)
            _check_hooks(self.ddp)  # one may have been registered since

    def _fragment(self, name: str) -> Fragment | None:
        # An equal share of every matrix, so that a drop leaves the rest where it is; the remainders go round.
        numel = self.parameters[name].numel()
        share = -(-numel // self.world_size)
        start = (self.rank + self._order[name]) % self.world_size * share
        return Fragment(name, start, min(share, numel - start)) if start < numel else None

    def _trained_set_changed(self) -> None:
        if self.ddp is not None:
            rebuild_reducer(self.ddp)

    def _holds_first_copy(self, parameter: nn.Parameter) -> bool:
        return self.rank == 0

    def settle(self) -> None:
        # A reducer reorders its buckets after its first backward, and with them the order of sums.
        self._trained_set_changed()


class Fsdp2Engine(NativeEngine):
    """accelerate's FSDP with `fsdp_version: 2`, CPU offload and HSDP included."""

    kind = "fsdp2"
    sharded = True

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        super().__init__(accelerator, model, optimizer)
        self._places = {p: _place(name, p) for name, p in self.parameters.items()}

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _offset(self, parameter: nn.Parameter) -> int:
        return self._places[parameter][0]

    def _holds_first_copy(self, parameter: nn.Parameter) -> bool:
        return self._places[parameter][1]

    def _fragment(self, name: str) -> Fragment | None:
        parameter = self.parameters[name]
        numel = self._local(parameter.detach()).numel()
        return Fragment(name, self._offset(parameter), numel) if numel and self._holds_first_copy(parameter) else None

    def publish(self, names: Sequence[str]) -> None:
        """What a forward pass without a backward pass (an evaluation) has left gathered is of before."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def assign(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        super().assign(tensors, names)
        self.publish(names)

    @torch.no_grad()
    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            parameter = self.parameters[name].detach()
            found[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()
        return found


def _place(name: str, parameter: nn.Parameter) -> tuple[int, bool]:
    """The first element of this rank's part, and whether this is the first rank that holds the part."""
    if not isinstance(parameter, DTensor):  # left out of the sharding: the same on every rank
        return 0, dist.get_rank() == 0
    mesh, first, start = parameter.device_mesh, True, 0
    for dimension, placement in enumerate(parameter.placements):
        rank, size = mesh.get_local_rank(dimension), mesh.size(dimension)
        if placement.is_replicate():
            first = first and rank == 0
        elif placement == Shard(0) and start == 0:
            rows = parameter.shape[0]
            start = min(rank * -(-rows // size), rows) * (parameter.numel() // max(rows, 1))
        else:
            raise UnsupportedEngineError(
                f"{name} is laid out as {parameter.placements}: freezing is for data parallelism, where FSDP2 shards "
                f"rows over one dimension of the mesh. Leave tensor, context and expert parallelism out."
            )
    return start, first


def _check_hooks(ddp: DistributedDataParallel) -> None:
    """Refuse communication hooks that no reducer made anew can take over, or that do not give the mean.

    Raises:
        UnsupportedEngineError: Names the hook.
    """
    for hook, state in ddp._comm_hooks:
        name = getattr(hook, "__qualname__", type(hook).__name__)
        if name == "noop_hook" or not (state is None or isinstance(state, dist.ProcessGroup)):
            kept = "" if state is None else f", whose {type(state).__name__} is kept by the reducer's buckets"
            raise UnsupportedEngineError(
                f"Freezing does not support DDP's communication hook {name}{kept}: a freeze makes other buckets, and "
                f"scores need the exact mean of the gradients. Leave it out, or use fp16_compress_hook or "
                f"bf16_compress_hook."
            )


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Give DDP a reducer over the parameters that still train, as its __init__ does.

    The old reducer's destructor takes its autograd hooks away, so nothing may hold on to it.
    """
    static_graph = ddp.static_graph
    ddp.reducer = ddp.logger = None  # type: ignore[assignment]
    parameters, expect_sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse, names, static_graph)
    for hook, hook_state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, hook_state, hook)  # type: ignore[attr-defined]
    ddp._has_rebuilt_buckets = False
    if static_graph:
        ddp._set_static_graph()


def _flat(tensor: Tensor) -> Tensor:
    """A 1-D view, to be written through."""
    return tensor.view(-1)
