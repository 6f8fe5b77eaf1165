"""One process, or DDP: every rank holds all gradients and all optimizer state.

Scores are sharded all the same: each rank observes an equal share of the elements, so that score
memory and work fall with the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import UnsupportedEngineError
from ..freezing import Fragment
from .base import Engine, Observer, ParameterState, release, split_state

_CLIP_ONCE = (
    "Freezing scores are taken before clipping, which can only be undone where all gradients are clipped together: "
    "call accelerator.clip_grad_norm_(model.parameters(), ...) once per update, if accelerator.sync_gradients."
)


class ReplicatedEngine(Engine):
    """Plain PyTorch training, with or without DistributedDataParallel."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(accelerator.unwrap_model(model, keep_torch_compile=False))
        self.accelerator = accelerator
        self.ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        self.kind = "ddp" if self.ddp is not None else "single"
        self._optimizer = optimizer
        if self.ddp is None and self.world_size > 1:
            raise UnsupportedEngineError(
                f"There are {self.world_size} processes, but the model is not wrapped in DDP: pass the model that "
                f"accelerator.prepare() returned; on a CPU create the accelerator with Accelerator(cpu=True)."
            )
        unknown = [p for group in optimizer.param_groups for p in group["params"] if p not in self.names]
        if unknown:
            raise UnsupportedEngineError(
                f"The optimizer holds {len(unknown)} tensors that are not parameters of the model. Create it from the "
                f"PEFT model's own parameters, before accelerator.prepare()."
            )
        self._fragments: list[Fragment] = []
        self._observing = False
        self._clipped: tuple[set[int], Tensor] | None = None
        self._sentinel: tuple[Tensor, int] | None = None

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    @property
    def trainable(self) -> list[str]:
        return [self.names[p] for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    # -- the step ----------------------------------------------------------------------------

    def watch(self, observe: Observer, updated: Callable[[], None]) -> None:
        if self.accelerator.scaler is not None and getattr(self._optimizer, "_step_supports_amp_scaling", False):
            raise UnsupportedEngineError(
                f"A fused {type(self._optimizer).__name__} skips overflowed fp16 updates inside, where freezing cannot "
                f'see it. Create it with fused=False (Trainer: optim="adamw_torch"), or train in bf16.'
            )

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._refuse_unseen_change()
            parameters = [self.parameters[f.name] for f in self._fragments]
            observe(
                0,
                [self._piece(p, self._gradient(p), f) for p, f in zip(parameters, self._fragments, strict=True)],
                lambda: [self._piece(p, p.detach(), f) for p, f in zip(parameters, self._fragments, strict=True)],
                self._unclip(parameters),
            )

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._clipped = self._sentinel = None
            updated()

        self._handles.append(self._optimizer.register_step_pre_hook(before).remove)
        self._handles.append(self._optimizer.register_step_post_hook(after).remove)
        self._wrap_accelerator("clip_grad_norm_", self._clip_grad_norm)
        self._wrap_accelerator("clip_grad_value_", self._clip_grad_value)
        self._wrap_accelerator("backward", self._backward)

    def _wrap_accelerator(self, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(self.accelerator, name)
        setattr(self.accelerator, name, lambda *args, **kwargs: replacement(original, *args, **kwargs))
        self._handles.append(lambda: setattr(self.accelerator, name, original))

    def _backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._clipped = None  # of an update that was skipped
        result = original(*args, **kwargs)
        self._note_version()
        return result

    def _clip_grad_norm(
        self, original: Callable[..., Tensor], parameters: Any, max_norm: float, norm_type: float = 2
    ) -> Tensor:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._observing and not self.accelerator.sync_gradients:
            raise UnsupportedEngineError(_CLIP_ONCE)
        norm = original(parameters, max_norm, norm_type)
        if self._observing:
            # What torch.nn.utils.clip_grad_norm_ multiplied the gradients with.
            coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            clipped = {id(p) for p in parameters}
            if self._clipped is not None:  # clipped once before in this update
                if self._clipped[0] != clipped:
                    raise UnsupportedEngineError(_CLIP_ONCE)
                coefficient = coefficient * self._clipped[1]
            self._clipped = (clipped, coefficient)
            self._note_version()
        return norm

    def _clip_grad_value(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not self._observing:
            return original(*args, **kwargs)
        raise UnsupportedEngineError(
            "Freezing scores are taken from gradients before clipping, and clipping by value cannot be undone. "
            "Use accelerator.clip_grad_norm_ instead."
        )

    def _unclip(self, parameters: Sequence[nn.Parameter]) -> Tensor | float:
        if self._clipped is None or not parameters:
            return 1.0
        clipped, coefficient = self._clipped
        inside = [id(p) in clipped for p in parameters]
        if any(inside) and not all(inside):
            raise UnsupportedEngineError(_CLIP_ONCE)
        return 1.0 / coefficient.to(torch.float32) if all(inside) else 1.0

    def _note_version(self) -> None:
        if self._fragments and (grad := self.parameters[self._fragments[0].name].grad) is not None:
            self._sentinel = (grad, grad._version)

    def _refuse_unseen_change(self) -> None:
        """Gradients that changed behind our back were clipped by torch itself, most likely."""
        if self._sentinel is None or self.accelerator.scaler is not None:  # the scaler unscales in place
            return
        grad, version = self._sentinel
        if grad._version != version:
            raise UnsupportedEngineError(
                "The gradients changed between accelerator.backward() and optimizer.step(). Freezing scores need "
                "them before clipping: use accelerator.clip_grad_norm_ instead of torch.nn.utils.clip_grad_norm_."
            )

    # -- gradients ---------------------------------------------------------------------------

    def buckets(self, names: Sequence[str]) -> list[list[Fragment]]:
        total = sum(self.parameters[name].numel() for name in names)
        share = -(-total // self.world_size)
        low, high = self.rank * share, (self.rank + 1) * share
        offset, fragments = 0, []
        for name in names:
            numel = self.parameters[name].numel()
            start, stop = max(low - offset, 0), min(high - offset, numel)
            if start < stop:
                fragments.append(Fragment(name, start, stop - start))
            offset += numel
        self._fragments, self._observing = fragments, bool(names)
        return [fragments]

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        # A matrix outside this step's graph (an unused layer) has had no gradient: it is zero.
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    @staticmethod
    def _piece(parameter: nn.Parameter, tensor: Tensor, fragment: Fragment) -> Tensor:
        return tensor.reshape(-1)[fragment.start : fragment.start + fragment.numel]

    # -- state by name -----------------------------------------------------------------------

    def state(self) -> dict[str, ParameterState]:
        states = {}
        for name in self.trainable:
            parameter = self.parameters[name]
            moments, scalars = split_state(self._optimizer.state.get(parameter, {}), parameter.numel())
            flat = {key: moment.view(-1) for key, moment in moments.items()}
            states[name] = ParameterState(parameter.detach().view(-1), flat, scalars)
        return states

    @torch.no_grad()
    def rebuild(self, state: Mapping[str, ParameterState]) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if self.names[parameter] not in state:
                    release(parameter)
                    self._optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if self.names[p] in state]
        for name, held in state.items():
            parameter = self.parameters[name]
            if parameter.data_ptr() == held.value.data_ptr():
                continue  # the state came from this optimizer and never left it
            parameter.copy_(held.value.view(parameter.shape))
            shaped = {key: moment.view(parameter.shape).to(parameter.device) for key, moment in held.moments.items()}
            self._optimizer.state[parameter] = {**held.scalars, **shaped}
        if self.ddp is not None:
            self._rebuild_reducer(self.ddp)

    @staticmethod
    def _rebuild_reducer(ddp: DistributedDataParallel) -> None:
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

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.parameters[name].detach() for name in names}

    def settle(self) -> None:
        # A reducer reorders its buckets after its first backward, and with them the order of sums.
        if self.ddp is not None:
            self._rebuild_reducer(self.ddp)

    def scaling(self) -> dict[str, Any]:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def restore_scaling(self, scaling: Mapping[str, Any]) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(scaling))

    def moment_bytes(self) -> int:
        states = self.state().values()
        return sum(moment.nbytes for state in states for moment in state.moments.values())
