"""PEFT's private interfaces that the adapter uses (see aflora_dist/contract.py)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..contract import Private
from ..names import unwrapped, without_wrappers

_TUNER = "public extension points for tuners outside of PEFT"

MAPPINGS = [
    Private("peft.mapping", name, "make PEFT know a method that is not in its enum", "a public way to register a tuner")
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
]
TUNER = [
    Private("BaseTuner", name, why, _TUNER)
    for name, why in (
        ("_prepare_adapter_config", "find the target modules of known architectures"),
        ("_create_and_replace", "put an adapter around a layer"),
        ("_replace_module", "put an adapter around a layer"),
        ("_prepare_model", "refuse an adapter before anything of the model changes"),
        ("_check_target_module_exists", "refuse an adapter before anything of the model changes"),
        ("_check_target_module_compatiblity", "refuse an adapter before anything of the model changes"),
        ("_cast_adapter_dtype", "give the adapter of a sharded model its dtype"),
        ("get_model_config", "know the architecture"),
    )
]
SAVING = [
    Private(
        "BaseTuner",
        "_get_adapter_state_dict",
        "refuse to save an adapter without what is frozen",
        _TUNER,
        since="0.21",
    )
]
LAYER = [
    Private("BaseTunerLayer", name, why, _TUNER)
    for name, why in (
        ("_move_adapter_to_device_of_base_layer", "put an adapter where its layer lies"),
        ("_freeze_non_trainable_peft_weights", "keep frozen matrices frozen when PEFT switches gradients on"),
        ("get_base_weight", "merge an adapter into quantized layers, too"),
        ("set_base_weight", "merge an adapter into quantized layers, too"),
    )
]
MODEL = [Private("PeftModel", "_enable_peft_forward_hooks", "mix adapters in one batch", _TUNER)]
FUNCTIONS = [
    Private("peft.tuners.tuners_utils", "_maybe_include_all_linear_layers", "know what all-linear stands for", _TUNER),
    Private("peft.tuners.tuners_utils", "_get_in_out_features", "know the size of a quantized layer", _TUNER),
    Private("peft.tuners.tuners_utils", "check_adapters_to_merge", "merge an adapter", _TUNER),
]
BACKWARD = [
    Private("torch._C", "_current_graph_task_id", "know a recomputation in backward", "a public is_in_backward()"),
]
SAVED = [
    Private("torch._C._autograd", "_top_saved_tensors_default_hooks", "know gradient checkpointing", "a public query"),
]
GLOBAL_HOOKS = [
    Private("torch.nn.modules.module", "_has_any_global_hook", "call a hooked layer as it is", "a public query"),
]
HOOKS = [
    Private("torch.nn.Module", name, "call a hooked layer as it is", "a public query")
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
]
PRIVATE = {
    "peft": MAPPINGS + TUNER + SAVING + LAYER + MODEL + FUNCTIONS,
    "torch": BACKWARD + SAVED + GLOBAL_HOOKS + HOOKS,
}


def teach_saving(kind: str, check: Callable[[nn.Module, str, Mapping[str, Tensor]], None]) -> None:
    """Have PEFT before 0.21 save adapters of a method that is not in its enum, and have them checked first.

    There a tuner is not asked what to save of it: one function goes through PEFT's own methods, by name. Biases that
    train with an adapter it knows of its own methods only.

    Args:
        kind: The method's name.
        check: Called with the model, the adapter's name and the state dict that it is saved from.
    """
    if kind not in PeftType.__members__:
        member = str.__new__(PeftType, kind)
        member._name_ = member._value_ = kind
        PeftType._member_map_[kind] = PeftType._value2member_map_[kind] = member
        PeftType._member_names_.append(kind)
    original = peft.get_peft_model_state_dict
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def checked(model: Any, state_dict: Any = None, adapter_name: str = "default", **kwargs: Any) -> Any:
        config = model.peft_config[adapter_name]
        if config.peft_type != kind:
            return original(model, state_dict, adapter_name, **kwargs)
        held = model.state_dict() if state_dict is None else state_dict
        state_dict = {unwrapped(key): tensor for key, tensor in held.items()}
        with without_wrappers(model):
            check(model, adapter_name, state_dict)
            return original(model, state_dict, adapter_name, **kwargs) | _biases(model, config.bias, state_dict)

    for name, module in list(sys.modules.items()):  # all that have imported it by name
        if name.partition(".")[0] == "peft" and vars(module).get("get_peft_model_state_dict") is original:
            module.get_peft_model_state_dict = checked  # type: ignore[attr-defined]


def _biases(model: nn.Module, which: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict the biases that train with an adapter; those of `modules_to_save` PEFT saves by itself."""
    if which == "none":
        return {}
    layers = [
        (name, m) for name, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    adapted = {f"{name}.base_layer.bias" for name, m in layers if isinstance(m, BaseTunerLayer)}
    wrapped = tuple(f"{name}." for name, m in layers if not isinstance(m, BaseTunerLayer))
    biases = {name for name in state_dict if name.endswith(".bias") and not name.startswith(wrapped)}
    return {name: state_dict[name] for name in (biases if which == "all" else biases & adapted)}


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards the parameter."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 shards it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass, as recomputing with gradient checkpointing is."""
    return backward_pass() != -1


def backward_pass() -> int:
    """The number of the backward pass that this thread is inside of; -1 for none."""
    return torch._C._current_graph_task_id()


def keeps_all_for_backward() -> bool:
    """Whether autograd now keeps what backward needs as it is: gradients are on, nothing offloads or recomputes."""
    return (
        torch.is_grad_enabled()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and not in_backward()
    )


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
