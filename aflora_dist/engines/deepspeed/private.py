"""DeepSpeed's private interfaces that its engines use (see aflora_dist/contract.py)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from ...contract import Private, is_older

_REBUILD = "a public way to take parameters out of a ZeRO optimizer"
_LAYOUT = "a public map from parameters to flat partitions"


def _of(owner: str, why: str, instead: str, *names: str, since: str = "") -> list[Private]:
    return [Private(owner, name, why, instead, since) for name in names]


ENGINE = (
    _of(
        "DeepSpeedEngine",
        "make a ZeRO optimizer over the parameters that still train",
        _REBUILD,
        "_configure_zero_optimizer",
        "basic_optimizer",
        "optimizer",
        "_config",
    )
    + _of(
        "DeepSpeedEngine",
        "know which updates were applied and at which micro-batch",
        "a public hook after an update",
        "was_step_applied",
        "is_gradient_accumulation_boundary",
    )
    + _of(
        "DeepSpeedEngine",
        "save frozen matrices, too, where frozen parameters are left out",
        "a public list of what to keep",
        "_zero3_consolidated_16bit_state_dict",
        "module_state_dict",
    )
)
BOTH = _of(
    "DeepSpeedZeroOptimizer",
    "undo loss scaling and clipping",
    "unclipped gradients, or the factor applied",
    "loss_scaler",
    "dynamic_loss_scale",
    "overflow",
    "clip_grad",
    "_global_grad_norm",
) + _of("DeepSpeedZeroOptimizer", "let go of an old ZeRO optimizer", _REBUILD, "_grad_acc_hooks")
ZERO12 = (
    _of(
        "DeepSpeedZeroOptimizer",
        "know where each parameter lies in the flat partitions",
        _LAYOUT,
        "bit16_groups",
        "round_robin_bit16_groups",
        "single_partition_of_fp32_groups",
        "partition_size",
    )
    + _of(
        "DeepSpeedZeroOptimizer",
        "know where each parameter lies in the flat partitions",
        _LAYOUT,
        "round_robin_bit16_offsets",
        since="0.19.7",
    )
    + _of("DeepSpeedZeroOptimizer", "bring restored master weights into the model", _REBUILD, "update_lp_params")
)
ZERO3 = (
    _of(
        "DeepSpeedZeroOptimizer_Stage3",
        "know where each parameter lies in the flat partitions",
        _LAYOUT,
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "grad_position",
        "get_param_id",
    )
    + _of(
        "DeepSpeedZeroOptimizer_Stage3",
        "make a ZeRO-3 optimizer that keeps the module hooks",
        _REBUILD,
        "parameter_offload",
        "persistent_parameters",
        "initialize_ds_offload",
        "_leaf_module_hooks",
        "ipg_buckets",
        "_reassign_or_swap_out_partitioned_parameters",
    )
    + _of(
        "DeepSpeedZeroOptimizer_Stage3",
        "make a ZeRO-3 optimizer that keeps the module hooks",
        _REBUILD,
        "_unpin_offload_buffers",
        since="0.19.6",
    )
)
PRIVATE = {"deepspeed": ENGINE + BOTH + ZERO12 + ZERO3}


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
