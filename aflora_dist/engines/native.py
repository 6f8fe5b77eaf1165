"""Plain PyTorch training: what one process and DDP (ddp.py) and FSDP2 (fsdp2.py) have in common.

A torch optimizer updates the model's own parameters. A drop moves no byte between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ..compat.accelerate import ACCELERATOR, optimizers, unwrap
from ..compat.contract import require_private
from ..compat.torch import AUTOGRAD, let_unscale, unscales_itself
from ..errors import AFLoRAError, UnsupportedEngineError
from ..freezing import Fragment
from ..names import named_parameters
from ..notices import logger
from .base import Engine, Record
from .clipping import Clipping
from .optimizers import each_optimizer, inner_optimizer, release
from .transfer import Move, Piece, plan


class NativeEngine(Engine):
    """What one process, DDP and FSDP2 have in common: a torch optimizer over the model's own parameters."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        require_private("accelerate", accelerator, ACCELERATOR)
        require_private("torch", torch.autograd.Variable, AUTOGRAD)
        inner = inner_optimizer(optimizer)
        wrappers = [optimizer, *optimizers(accelerator)]
        self._wrapper = next(
            (w for w in wrappers if isinstance(w, AcceleratedOptimizer) and w.optimizer is inner), None
        )
        unwrapped = unwrap(accelerator, model)
        _check(accelerator, unwrapped, inner, self._wrapper)
        self._fragments: list[Fragment] = []
        self._observed: list[nn.Parameter] = []
        self._applied = self._stepping = self._inside = False
        self._originals = [(list(g["params"]), g.get("param_names")) for g in inner.param_groups]
        super().__init__(accelerator, unwrapped, inner)
        self.clipping = Clipping(accelerator, lambda: self._observed)

    def _grouped(self) -> list[list[str]]:
        return [[self.names[p] for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]

    @property
    def trainable(self) -> list[str]:
        # What has frozen is in no group. What a user switched off for a while is, and trains on when it is on again;
        # what did not train at first may have been switched on since. A later group may hold tensors of another model.
        found: list[str] = []
        later: list[list[str]] = [[] for _ in self.optimizer.param_groups[len(self.members) :]]
        for members, group in zip([*self.members, *later], self.optimizer.param_groups, strict=True):
            known = set(members)
            for parameter in group["params"]:
                name = self.names.get(parameter)
                if name is None or (name not in known and not parameter.requires_grad):
                    continue
                if name not in known:
                    members.append(name)
                found.append(name)
        return found

    # -- the step ----------------------------------------------------------------------------

    def watch(self, done: Callable[[bool], None]) -> None:
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
            self._inside = True
            parameters = [self.parameters[f.name] for f in self._fragments]
            scale = self.clipping.factor(parameters)
            if not self._fragments or self.observer is None:
                return
            self.observer(
                0,
                [self._piece(p, self._gradient(p), f) for p, f in zip(parameters, self._fragments, strict=True)],
                lambda: [self._piece(p, p.detach(), f) for p, f in zip(parameters, self._fragments, strict=True)],
                scale,
            )

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._applied, self._inside = True, False
            if self._wrapper is None:
                self._done(done)

        # Of a step that is compiled these are called as they are: they ask for numbers.
        done, pre, post = map(torch.compiler.disable, (done, before, after))
        self._announce = done
        self._handles.append(self.optimizer.register_step_pre_hook(pre).remove)
        self._handles.append(self.optimizer.register_step_post_hook(post).remove)
        if self._wrapper is not None:  # it knows of updates that are skipped
            self._patch(self._wrapper, "step", self._step)
        if self.accelerator.scaler is not None and unscales_itself(self.optimizer):
            # A fused optimizer would unscale gradients and skip an update inside its kernel, unseen: the scaler is to
            # do both, as for all others. Where gradients are clipped it unscales them in any case.
            let_unscale(self.optimizer, False)
            self._handles.append(lambda: let_unscale(self.optimizer, True))
        self._patch(self._wrapper or self.optimizer, "zero_grad", self._zero_grad)
        self.clipping.watch()
        self._handles.append(self.clipping.unwatch)
        self._handles.append(each_optimizer(self, NativeEngine._tell_of))

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stepping = True
        try:
            result = original(*args, **kwargs)
        finally:
            self._stepping = self._inside = False
        if self.accelerator.sync_gradients:
            self._done(self._announce)
        return result

    def _zero_grad(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.sync_gradients or self._wrapper is None:  # else accelerate does nothing
            self.clipping.updated()
        return original(*args, **kwargs)

    def _tell_of(self, other: Any) -> None:
        """Warn if another optimizer updates what this one is to, as in a second phase of training."""
        if other is self.optimizer or self._inside:  # one may call another within its step
            return
        watched = {id(p) for p in self._observed}
        for parameter in (p for group in other.param_groups for p in group["params"] if id(p) in watched):
            logger.warning(
                f"Another optimizer than the one that AdaptiveFreezing was given updates {self.names[parameter]}: its "
                f"updates are neither counted nor scored. Step the one that was given; or, for another phase of "
                f"training, detach() this freezing and create one with the new optimizer."
            )
            return

    def _done(self, done: Callable[[bool], None]) -> None:
        applied, self._applied = self._applied, False
        self.clipping.updated()
        done(applied)

    def _check_reduction(self) -> None:
        """Raise UnsupportedEngineError unless the gradients of an update are the means over the ranks."""

    # -- gradients ---------------------------------------------------------------------------

    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        if odd := next((name for name in names if self.parameters[name].is_complex()), None):
            raise UnsupportedEngineError(
                f"{odd} is complex, and the scores of Eq. 2 to 4 are of real numbers. Leave it out with freezable=..."
            )
        found = [self._fragment(name) for name in names]
        self._fragments = [fragment for fragment in found if fragment is not None]
        self._observed = [self.parameters[name] for name in names]
        self.clipping.follow()
        return [self._fragments]

    def _fragment(self, name: str) -> Fragment | None:
        """What this rank observes of a parameter."""
        raise NotImplementedError

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        # A matrix outside this step's graph (an unused layer) has had no gradient: it is zero.
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        if parameter.grad.layout != torch.strided:
            raise UnsupportedEngineError(
                f"The gradient of {self.names[parameter]} is sparse (nn.Embedding(sparse=True)), which has no score by "
                f"element. Let it be dense, or leave that parameter out with freezable=..."
            )
        return parameter.grad

    def _piece(self, parameter: nn.Parameter, tensor: Tensor, fragment: Fragment) -> Tensor:
        local = self._local(tensor).reshape(-1)
        start = fragment.start - self._offset(parameter)
        return local[start : start + fragment.numel]

    # -- dropping ----------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, names: Sequence[str]) -> list[Move]:
        wanted, observed = set(names), self._fragments
        # Parameters that never trained, and param groups that were added since, stay as they are.
        for group, members, (parameters, named) in zip(
            self.optimizer.param_groups, self.members, self._originals, strict=False
        ):
            present, original = {id(p) for p in group["params"]}, {id(p) for p in parameters}
            for member in members:
                parameter = self.parameters[member]
                if member not in wanted:
                    release(parameter)
                    self.optimizer.state.pop(parameter, None)
                elif id(parameter) not in present:
                    parameter.requires_grad_(True)
            gone = {id(self.parameters[member]) for member in members if member not in wanted}
            since = [p for p in group["params"] if id(p) not in original and id(p) not in gone]  # appended by the user
            if named is not None:
                names_left = [n for n, p in zip(named, parameters, strict=True) if id(p) not in gone]
                group["param_names"] = names_left + [self.names.get(p, "") for p in since]
            group["params"] = [p for p in parameters if id(p) not in gone] + since
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
                    found.append(Piece(key, self._offset(parameter), local.view(-1)))
        return found

    def _holds_first_copy(self, parameter: nn.Parameter) -> bool:
        """Whether this rank is the first of those that hold the same of a parameter."""
        return True

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

    def snapshot(self, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], Record]:
        if names is None:
            self._refuse_what_came_later()
        return super().snapshot(names)

    def _refuse_what_came_later(self) -> None:
        """Raise AFLoRAError where the optimizer updates what a snapshot, which goes by name, would leave out."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self.names and parameter.requires_grad:
                    raise AFLoRAError(
                        f"The optimizer was given a parameter of {tuple(parameter.shape)} that the model did not have "
                        f"when freezing began, so what is saved would lack it. Add modules first, and then create "
                        f"AdaptiveFreezing."
                    )

    def state(self, names: Sequence[str]) -> dict[str, Record]:
        states = {name: self.optimizer.state.get(self.parameters[name]) for name in names}
        return {name: self._told(held) for name, held in states.items() if held}

    def scaling(self) -> dict[str, Any]:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(scaling))


def _check(accelerator: Accelerator, model: nn.Module, optimizer: Any, wrapper: AcceleratedOptimizer | None) -> None:
    """Raise an UnsupportedEngineError for what freezing would be wrong under; say what differs from other engines."""
    known = {id(p) for p in model.parameters()}
    unknown = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if unknown:
        raise UnsupportedEngineError(
            f"The optimizer holds {unknown} tensors that are not parameters of the model. Create it from the model's "
            f"own parameters, as PEFT returned it, before accelerator.prepare(); of two models that one optimizer "
            f"trains make one (nn.ModuleDict)."
        )
    if accelerator.scaler is not None and wrapper is None:
        raise UnsupportedEngineError(
            "Under fp16 updates can be skipped, which only the optimizer that accelerator.prepare() returned knows "
            "of: pass the optimizer to prepare(), and step it."
        )
    devices = sorted({str(p.device) for group in optimizer.param_groups for p in group["params"]})
    if len(devices) > 1:
        raise UnsupportedEngineError(
            f"The trained parameters are spread over {', '.join(devices)} (device_map?). "
            f"Load the model on one device, or spread it with ZeRO-3 or FSDP2."
        )
    named = named_parameters(model)
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
