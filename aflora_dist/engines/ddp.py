"""One process, and DDP: every rank holds all gradients and all optimizer state.

Scores are sharded all the same: each rank observes an equal share of every matrix, so that score memory and work fall
with the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..compat.contract import require_private
from ..compat.torch import REDUCER, comm_hooks, joins, rebuild_reducer
from ..errors import UnsupportedEngineError
from ..freezing import Fragment
from .native import NativeEngine
from .optimizers import release

_LOCAL_SGD = (
    "The gradients of this update were not reduced over the ranks (model.no_sync(), as accelerate's LocalSGD does): "
    "each rank would score its own. Train without it; gradient accumulation goes through accelerator.accumulate(model)."
)


class ReplicatedEngine(NativeEngine):
    """One process, or DistributedDataParallel."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        self.ddp = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        self.kind = "ddp" if self.ddp is not None else "single"
        if self.ddp is None and self.world_size > 1:
            raise UnsupportedEngineError(
                f"There are {self.world_size} processes, but the model is not wrapped in DDP: pass the model that "
                f"accelerator.prepare() returned; on a CPU create the accelerator with Accelerator(cpu=True); with "
                f"Trainer evaluate after train(), for transformers wraps no model that it has evaluated."
            )
        if self.ddp is not None:
            require_private("torch", self.ddp, REDUCER)
            check_hooks(self.ddp)
            if self.ddp.static_graph:
                raise UnsupportedEngineError(
                    "DDP with static_graph=True takes the graph of its first step for that of all others, and each "
                    "freeze changes it. Leave it out (ddp_static_graph of TrainingArguments)."
                )
        super().__init__(accelerator, model, optimizer)
        self._order = {name: i for i, name in enumerate(self.parameters)}

    def _check_reduction(self) -> None:
        if self.ddp is not None:
            if not self.ddp.require_backward_grad_sync:
                raise UnsupportedEngineError(_LOCAL_SGD)
            check_hooks(self.ddp)  # one may have been registered since
            # At every update: names are asked for only where something is off.
            off = [p for group in self.optimizer.param_groups for p in group["params"] if not p.requires_grad]
            if off and not self.ddp.find_unused_parameters:
                self._refuse_switched_off()
            if joins(self.ddp):
                raise UnsupportedEngineError(
                    "Ranks with more batches than others (join_uneven_inputs, torch's Join) train on alone, and cannot "
                    "freeze together. Give all ranks as many batches: Accelerator(even_batches=True) does, its default."
                )

    def _refuse_switched_off(self) -> None:
        for name in self.trainable:
            if not self.parameters[name].requires_grad:
                raise UnsupportedEngineError(
                    f"{name} is switched off (requires_grad_(False)), and DDP waits for its gradient: without it "
                    f"others are not reduced. Pass DistributedDataParallelKwargs(find_unused_parameters=True) to "
                    f"Accelerator."
                )

    def _fragment(self, name: str) -> Fragment | None:
        # An equal share of every matrix, so that a drop leaves the rest where it is; the remainders go round.
        numel = self.parameters[name].numel()
        share = -(-numel // self.world_size)
        start = (self.rank + self._order[name]) % self.world_size * share
        return Fragment(name, start, min(share, numel - start)) if start < numel else None

    def _trained_set_changed(self) -> None:
        if self.ddp is None:
            return
        trained = {*self.trainable}
        for name in (name for group in self.members for name in group if name not in trained):
            release(self.parameters[name])  # PEFT may have switched it on since it froze, and a reducer would wait
        off = [p for name in trained if not (p := self.parameters[name]).requires_grad]  # by the user, for a while
        for parameter in off:
            parameter.requires_grad_(True)
        rebuild_reducer(self.ddp)
        for parameter in off:
            parameter.requires_grad_(False)

    def _holds_first_copy(self, parameter: nn.Parameter) -> bool:
        return self.rank == 0

    def settle(self) -> None:
        # A reducer reorders its buckets after its first backward, and with them the order of sums.
        self._trained_set_changed()


def check_hooks(ddp: DistributedDataParallel) -> None:
    """Raise UnsupportedEngineError for hooks that no reducer made anew can take over, or that do not give the mean."""
    for hook, state in comm_hooks(ddp):
        name = getattr(hook, "__qualname__", type(hook).__name__)
        if name == "noop_hook" or not (state is None or isinstance(state, dist.ProcessGroup)):
            kept = "" if state is None else f", whose {type(state).__name__} is kept by the reducer's buckets"
            raise UnsupportedEngineError(
                f"Freezing does not support DDP's communication hook {name}{kept}: a freeze makes other buckets, and "
                f"scores need the exact mean of the gradients. Leave it out, or use fp16_compress_hook or "
                f"bf16_compress_hook."
            )
