"""DeepSpeed 0.19.3 and later. Does not import it.

What its engines (aflora_dist/engines/deepspeed) read of a DeepSpeedEngine and of ZeRO's optimizers is listed here and
read there: it is all that they do.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .contract import Private, is_older, private

_REBUILD = "a public way to take parameters out of a ZeRO optimizer"
_PLACES = ("know where each parameter lies in the flat partitions", "a public map from parameters to flat partitions")
_KEEP_HOOKS = ("make a ZeRO-3 optimizer that keeps the module hooks", _REBUILD)
_LET_GO = ("let go of an old ZeRO optimizer", _REBUILD)
_TRACE = ("fetch nothing for a backward pass that does not run", "a public way to have ZeRO-3 record a pass anew")
_engine = partial(private, "DeepSpeedEngine")
_zero = partial(private, "DeepSpeedZeroOptimizer")
_zero3 = partial(private, "DeepSpeedZeroOptimizer_Stage3")

ENGINE = [
    *_engine(
        "_configure_zero_optimizer basic_optimizer optimizer _config",
        "make a ZeRO optimizer over the parameters that still train",
        _REBUILD,
    ),
    *_engine("zero_prefetch_bucket_size", "know whether passes must be what was recorded", _TRACE[1]),
    *_engine(
        "was_step_applied is_gradient_accumulation_boundary",
        "know which updates were applied and at which micro-batch",
        "a public hook after an update",
    ),
    *_engine(
        "_zero3_consolidated_16bit_state_dict module_state_dict",
        "save frozen matrices, too, where frozen parameters are left out",
        "a public list of what to keep",
    ),
    *_engine(
        "has_moe_layers pipeline_parallelism sequence_parallel_size client_lr_scheduler lr_scheduler",
        "refuse what freezing would be wrong under",
        "a public description of an engine",
    ),
]
BOTH = [
    *_zero(
        "loss_scaler loss_scale dynamic_loss_scale overflow clip_grad _global_grad_norm",
        "undo loss scaling and clipping",
        "unclipped gradients, or the factor applied",
    ),
    *_zero("destroy _grad_acc_hooks", *_LET_GO),
]
ZERO12 = [
    *_zero("bit16_groups round_robin_bit16_groups single_partition_of_fp32_groups partition_size", *_PLACES),
    *_zero("round_robin_bit16_offsets", *_PLACES, since="0.19.7"),
    *_zero("update_lp_params", "bring restored master weights into the model", _REBUILD),
]
ZERO3 = [
    *_zero3("fp16_groups fp32_partitioned_groups_flat sub_group_to_group_id grad_position get_param_id", *_PLACES),
    *_zero3("parameter_offload persistent_parameters initialize_ds_offload", *_KEEP_HOOKS),
    *_zero3("_leaf_module_hooks ipg_buckets _reassign_or_swap_out_partitioned_parameters", *_KEEP_HOOKS),
    *_zero3("grad_partitions_flat_buffer", "forget the gradients of the update before", "zeroed gradients"),
    *_zero3("_unpin_offload_buffers", *_KEEP_HOOKS, since="0.19.6"),
]
GATHERING = private("Init", "_allgather_params_coalesced", "wait for all that ZeRO-3 gathers", "DeepSpeed 0.19.8")
PARAMETER = [  # and what else is there later: nobody looks for these beforehand
    *private("Parameter (ZeRO-3)", "ds_id ds_shape ds_numel", "know a sharded parameter's size", "a public query"),
    *private("Parameter (ZeRO-3)", "ds_tensor", *_LET_GO),
    *private("Parameter (ZeRO-3)", "ds_status all_gather partition", *_KEEP_HOOKS),
    *private("DeepSpeedZeRoOffload", "param_coordinator", *_TRACE),
    *private("PartitionedParameterCoordinator", "is_invalid_trace _invalidate_trace", *_TRACE),
    *private("Parameter (ZeRO-1, 2)", "_hp_mapping _zero_optimizer grad_accum", *_LET_GO),
]
PRIVATE: list[Private] = [*ENGINE, *BOTH, *ZERO12, *ZERO3, *GATHERING, *PARAMETER]


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards the parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 shards it."""
    return getattr(parameter, "ds_shape", parameter.shape)


@torch.no_grad()
def assign_sharded(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value, also where ZeRO-3 shards it. A collective there; pieces are of rank 0's value."""
    if not is_sharded(parameter):
        parameter.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if parameter.numel():  # gathered
            parameter.copy_(value.view(parameter.shape))


def offsets(zero: Any) -> list[list[int]]:
    """Where each parameter of `round_robin_bit16_groups` begins in its group's flat buffer, in elements.

    Before DeepSpeed 0.19.7 nothing lies between them; since then there can be padding.
    """
    if hasattr(zero, "round_robin_bit16_offsets"):
        return zero.round_robin_bit16_offsets
    return [[*accumulate((p.numel() for p in group), initial=0)][:-1] for group in zero.round_robin_bit16_groups]


def unpin(zero: Any) -> None:
    """Let go of ZeRO-3's page-locked buffers; before DeepSpeed 0.19.6 torch alone pins, and frees with the tensor."""
    if hasattr(zero, "_unpin_offload_buffers"):
        zero._unpin_offload_buffers()


def forget_passes(offload: Any) -> None:
    """Have ZeRO-3 (its `parameter_offload`) record anew what follows what in a pass: it fetches that ahead."""
    coordinator = offload.param_coordinator
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    # What may go after a module's forward, and what stays for its backward, is cached for the object, and never again.
    offload.param_coordinator = copy(coordinator)


def divide_once(engine: Any) -> None:
    """Divide the loss, and nothing else, by the number of batches that are accumulated.

    DeepSpeed before 0.19.6 divides the gradient at each output of the model that it passes: where a model returns
    loss and logits, as transformers' do, at both.
    """
    if not is_older("deepspeed", "0.19.6"):
        return
    original = engine.backward

    def backward(loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        loss = loss / engine.gradient_accumulation_steps() if scale_wrt_gas else loss
        return original(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    engine.backward = backward


def gather_completely() -> None:
    """Have ZeRO-3 wait for each parameter that it gathers on a CPU.

    DeepSpeed before 0.19.8 gathers several at once and waits for the last: over gloo others may still be on their way,
    and memory that nothing was written to yet is taken for them (its pull request 8539). On a GPU they come in order.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import Init

    original = Init._allgather_params_coalesced
    waits = not is_older("deepspeed", "0.19.8") or get_accelerator().device_name() != "cpu"
    if waits or original.__module__ == __name__:
        return

    def one_by_one(self: Any, param_list: list[Any], *args: Any, **kwargs: Any) -> None:
        for parameter in param_list:
            original(self, [parameter], *args, **kwargs)

    Init._allgather_params_coalesced = one_by_one
