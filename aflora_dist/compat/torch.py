"""torch 2.10 and later."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .contract import Private, private, require_private

_QUERY = "a public query"
_ddp = partial(private, "DistributedDataParallel")
_module = partial(private, "torch.nn.Module")
_NEW_REDUCER = ("give DDP a reducer over the parameters that still train", "a public way to rebuild a reducer")

REDUCER = [
    *_ddp("_build_params_for_reducer _build_debug_param_to_name_mapping _ddp_init_helper", *_NEW_REDUCER),
    *_ddp("_comm_hooks static_graph reducer", *_NEW_REDUCER),
    *_ddp("_join_config", "know that ranks go on alone", _QUERY),
    *_ddp("require_backward_grad_sync", "know that gradients were reduced over the ranks", _QUERY),
]
AUTOGRAD = private(
    "torch.autograd.Variable",
    "_execution_engine",
    "learn when a backward pass has ended (queue_callback)",
    "a public hook at the end of a backward pass",
)
BACKWARD = private("torch._C", "_current_graph_task_id", "know a recomputation in backward", _QUERY)
SAVED = private("torch._C._autograd", "_top_saved_tensors_default_hooks", "know gradient checkpointing", _QUERY)
GLOBAL_HOOKS = private("torch.nn.modules.module", "_has_any_global_hook", "call a hooked layer as it is", _QUERY)
MODULE = [
    *_module("_forward_hooks _forward_pre_hooks", "call a hooked layer as it is, and find hooks of ours", _QUERY),
    *_module("_backward_hooks _backward_pre_hooks", "call a hooked layer as it is", _QUERY),
    *_module("_compiled_call_impl", "fold before compiled code is entered", _QUERY),
    *_module("_non_persistent_buffers_set", "leave out what a state dict has not", _QUERY),
    *_module("_apply", "forget casts of weights that move", "a public hook", anywhere=True),
]
MEMORY = private(
    "torch.cuda.memory",
    "_record_memory_history _dump_snapshot",
    "show CUDA memory around a freeze",
    "a public recorder of CUDA memory",
    anywhere=True,
)
PRIVATE: list[Private] = [
    *REDUCER,
    *AUTOGRAD,
    *BACKWARD,
    *SAVED,
    *GLOBAL_HOOKS,
    *MODULE,
    *MEMORY,
    # Nobody looks for these beforehand: they are on objects that are made later, or used once, at the start.
    *_ddp("_has_rebuilt_buckets logger", *_NEW_REDUCER),
    *private("torch.distributed", "_register_comm_hook", *_NEW_REDUCER),
    *private(
        "torch.optim.AdamW",
        "_step_supports_amp_scaling",
        "have GradScaler unscale a fused optimizer's gradients where they are seen",
        "an option of GradScaler",
    ),
    *private(
        "Optimizer",
        "_optimizer_step_pre_hooks _optimizer_step_post_hooks",
        "try a copy of an optimizer without its owner's hooks",
        "a public way to remove hooks",
    ),
    *private(
        "torch.distributed.distributed_c10d",
        "_get_default_store",
        "have ranks wait for each other where nothing times out",
        "a public way to a process group's store",
    ),
    *private("Tensor", "_version", "know a change since a tensor was cast or clipped", _QUERY, anywhere=True),
    *private("Tensor", "_is_view", "add in place only to what is nobody's view", _QUERY, anywhere=True),
    *private("FSDP2's modules", "_is_fsdp_managed_module", "fold nothing ahead that FSDP2 shards", _QUERY),
    *private("DataParallel's replica", "_is_replica", "leave replicas alone", _QUERY),
    *private("torch._dynamo", "OptimizedModule", "fold before compiled code is entered", _QUERY),
    *private(
        "wrappers of modules",
        "_checkpoint_wrapped_module _fsdp_wrapped_module _orig_mod",
        "know parameters by the names that they have without them",
        "a public list of wrappers",
        anywhere=True,
    ),
    *private("LRScheduler", "_last_lr", "go on with the rates of a resumed run", "a public setter", anywhere=True),
]


def check_torch() -> None:
    """Raise an UnsupportedEngineError, with the release to install, unless torch has what adapted layers need."""
    for owner, entries in (
        (torch._C, BACKWARD),
        (torch._C._autograd, SAVED),
        (torch_module, GLOBAL_HOOKS),
        (nn.Module(), MODULE),
    ):
        require_private("torch", owner, entries)


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module's own parameters, gathered now or not; not where all of them are ignored."""
    # Asked at each forward pass: nn.Module's own search for an attribute that is not there takes many times as long.
    return vars(module).get("_is_fsdp_managed_module", False)


# -- a forward or backward pass ----------------------------------------------------------------


def is_traced() -> bool:
    """Whether the code that runs is being compiled or traced, and so has to be made of plain operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass, as recomputing with gradient checkpointing is."""
    return backward_pass() != -1


def backward_pass() -> int:
    """The number of the backward pass that this thread is inside of; -1 for none."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Call back at the end of the backward pass that this thread is inside of, after what was queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def weakly(method: Callable[[], None]) -> Callable[[Tensor], None]:
    """A hook that calls a method and does not keep its object alive: autograd holds hooks unseen by the collector."""
    reference = weakref.WeakMethod(method)

    def hook(_: Tensor) -> None:
        if (called := reference()) is not None:
            called()

    return hook


def keeps_all_for_backward() -> bool:
    """Whether autograd now keeps what backward needs as it is: gradients are on, nothing offloads or recomputes."""
    return (
        torch.is_grad_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not in_backward()
    )


# -- modules -----------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )


def forward_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks before and after a module's forward, to be looked at and to be taken away."""
    return [module._forward_pre_hooks, module._forward_hooks]


def is_replica(module: nn.Module) -> bool:
    """Whether the module is a copy that DataParallel has made for one forward pass."""
    return getattr(module, "_is_replica", False)


def is_compiled(module: nn.Module) -> bool:
    """Whether this module, not what is in it, is compiled: in place, or as a module around another one."""
    dynamo = sys.modules.get("torch._dynamo")  # which compiling imports
    return module._compiled_call_impl is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


def around_compiled(module: nn.Module, before: Callable[[], None], after: Callable[[], None] | None = None) -> None:
    """Call these around the call of a module that is compiled in place, hooks and all; else do nothing."""
    if module._compiled_call_impl is not None:
        module._compiled_call_impl = _Around(module._compiled_call_impl, before, after)


class _Around:
    """A module that was compiled in place, and what is called around it; its own hooks are compiled with it."""

    def __init__(self, call: Callable[..., Any], before: Callable[[], None], after: Callable[[], None] | None) -> None:
        self.call, self.before, self.after = call, before, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.before()
        try:
            return self.call(*args, **kwargs)
        finally:
            if self.after is not None:
                self.after()


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own buffers that belong to a state dict."""
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


# -- optimizers --------------------------------------------------------------------------------


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether GradScaler leaves unscaling, and skipping an update, to the optimizer: a fused one."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def let_unscale(optimizer: Optimizer, itself: bool) -> None:
    """Have a fused optimizer unscale gradients, or GradScaler."""
    optimizer._step_supports_amp_scaling = itself  # type: ignore[attr-defined]


def without_step_hooks(optimizer: Optimizer) -> None:
    """Take a copy's hooks away; the original keeps its own."""
    optimizer._optimizer_step_pre_hooks = type(optimizer._optimizer_step_pre_hooks)()
    optimizer._optimizer_step_post_hooks = type(optimizer._optimizer_step_post_hooks)()


# -- ranks -------------------------------------------------------------------------------------


def default_store() -> Any:
    """The store at which the default process group's ranks have met."""
    return distributed_c10d._get_default_store()


def comm_hooks(ddp: DistributedDataParallel) -> Sequence[tuple[Callable[..., Any], Any]]:
    """DDP's communication hooks, each with its state."""
    return ddp._comm_hooks


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Give DDP a reducer over the parameters that still train, as its __init__ does.

    The old reducer's destructor takes its autograd hooks away, so nothing may hold on to it.
    """
    ddp.reducer = ddp.logger = None  # type: ignore[assignment]
    parameters, expect_sparse = ddp._build_params_for_reducer()
    names: Mapping[int, str] = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse, names, False)
    for hook, state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]
    ddp._has_rebuilt_buckets = False


def joins(ddp: DistributedDataParallel) -> bool:
    """Whether a rank that runs out of batches only shadows the others' collectives from then on."""
    return bool(ddp._join_config.enable)
