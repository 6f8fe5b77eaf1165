"""DeepSpeed 0.19.3 and later. Does not import it.

What its engines (aflora_dist/engines/deepspeed) read of a DeepSpeedEngine and of ZeRO's optimizers is listed here and
read there: it is all that they do.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .contract import Private, is_older, private

_REBUILD = "a public way to take parameters out of a ZeRO optimizer"
_LAYOUT = "a public map from parameters to flat partitions"
_WHERE = "know where each parameter lies in the flat partitions"
_KEEP_HOOKS = "make a ZeRO-3 optimizer that keeps the module hooks"
_FREE = "let go of an old ZeRO optimizer"

ENGINE = [
    *private(
        "DeepSpeedEngine",
        "make a ZeRO optimizer over the parameters that still train",
        _REBUILD,
        "_configure_zero_optimizer",
        "basic_optimizer",
        "optimizer",
        "_config",
    ),
    *private(
        "DeepSpeedEngine",
        "know which updates were applied and at which micro-batch",
        "a public hook after an update",
        "was_step_applied",
        "is_gradient_accumulation_boundary",
    ),
    *private(
        "DeepSpeedEngine",
        "save frozen matrices, too, where frozen parameters are left out",
        "a public list of what to keep",
        "_zero3_consolidated_16bit_state_dict",
        "module_state_dict",
    ),
    *private(
        "DeepSpeedEngine",
        "refuse what freezing would be wrong under",
        "a public description of an engine",
        "has_moe_layers",
        "pipeline_parallelism",
        "client_lr_scheduler",
        "lr_scheduler",
    ),
]
BOTH = [
    *private(
        "DeepSpeedZeroOptimizer",
        "undo loss scaling and clipping",
        "unclipped gradients, or the factor applied",
        "loss_scaler",
        "loss_scale",
        "dynamic_loss_scale",
        "overflow",
        "clip_grad",
        "_global_grad_norm",
    ),
    *private("DeepSpeedZeroOptimizer", _FREE, _REBUILD, "destroy", "_grad_acc_hooks"),
]
ZERO12 = [
    *private(
        "DeepSpeedZeroOptimizer",
        _WHERE,
        _LAYOUT,
        "bit16_groups",
        "round_robin_bit16_groups",
        "single_partition_of_fp32_groups",
        "partition_size",
    ),
    *private("DeepSpeedZeroOptimizer", _WHERE, _LAYOUT, "round_robin_bit16_offsets", since="0.19.7"),
    *private("DeepSpeedZeroOptimizer", "bring restored master weights into the model", _REBUILD, "update_lp_params"),
]
ZERO3 = [
    *private(
        "DeepSpeedZeroOptimizer_Stage3",
        _WHERE,
        _LAYOUT,
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "grad_position",
        "get_param_id",
    ),
    *private(
        "DeepSpeedZeroOptimizer_Stage3",
        _KEEP_HOOKS,
        _REBUILD,
        "parameter_offload",
        "persistent_parameters",
        "initialize_ds_offload",
        "_leaf_module_hooks",
        "ipg_buckets",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    *private("DeepSpeedZeroOptimizer_Stage3", _KEEP_HOOKS, _REBUILD, "_unpin_offload_buffers", since="0.19.6"),
]
# ZeRO writes these on parameters; there is nobody to ask for them beforehand.
PARAMETER = [
    *private(
        "Parameter (ZeRO-3)",
        "know that a parameter is sharded, and its size",
        "a public query",
        "ds_id",
        "ds_shape",
        "ds_numel",
    ),
    *private("Parameter (ZeRO-3)", _FREE, _REBUILD, "ds_tensor"),
    *private("Parameter (ZeRO-3)", _KEEP_HOOKS, _REBUILD, "ds_status", "all_gather", "partition"),
    *private("Parameter (ZeRO-1, 2)", _FREE, _REBUILD, "_hp_mapping", "_zero_optimizer", "grad_accum"),
]
PRIVATE: list[Private] = [*ENGINE, *BOTH, *ZERO12, *ZERO3, *PARAMETER]


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards the parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 shards it."""
    return getattr(parameter, "ds_shape", parameter.shape)


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


def divide_once(engine: Any) -> None:
    """Divide the loss, and nothing else, by the number of batches that are accumulated.

    DeepSpeed 0.18.3 to 0.19.5 divides the gradient at each output of the model that it passes: where a model returns
    loss and logits, as transformers' do, at both.
    """
    if not is_older("deepspeed", "0.19.6"):
        return
    original = engine.backward

    def backward(loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        loss = loss / engine.gradient_accumulation_steps() if scale_wrt_gas else loss
        return original(loss, retain_graph=retain_graph, scale_wrt_gas=False)

    engine.backward = backward
