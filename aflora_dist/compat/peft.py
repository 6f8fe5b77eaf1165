"""PEFT 0.20 and later.

Imports it when asked: the adapter, which needs this, is imported before PEFT's own import has ended (_registration.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..names import unwrapped, without_wrappers
from .contract import Private, is_older, private, require_private

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner

_EXTENSIONS = "public extension points for tuners outside of PEFT"
_tuner = partial(private, "BaseTuner", instead=_EXTENSIONS, anywhere=True)
_layer = partial(private, "BaseTunerLayer", instead=_EXTENSIONS, anywhere=True)
_function = partial(private, "peft.tuners.tuners_utils", instead=_EXTENSIONS)

MAPPINGS = private(
    "peft.mapping",
    "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING",
    "make PEFT know a method that is not in its enum",
    "a public way to register a tuner",
)
TUNER = [
    *_tuner("_prepare_adapter_config", "find the target modules of an architecture"),
    *_tuner("_create_and_replace _replace_module", "put an adapter around a layer"),
    *_tuner("_prepare_model", "refuse an adapter before anything of the model changes"),
    *_tuner("_check_target_module_exists _check_target_module_compatiblity", "refuse an adapter in time"),
    *_tuner("_cast_adapter_dtype", "give the adapter of a sharded model its dtype"),
    *_tuner("get_model_config", "know the architecture"),
    *_tuner("_get_adapter_state_dict", "refuse to save an adapter without what is frozen", since="0.21"),
]
LAYER = [
    *_layer("_move_adapter_to_device_of_base_layer", "put an adapter where its layer lies"),
    *_layer("_freeze_non_trainable_peft_weights", "keep frozen matrices frozen when PEFT switches gradients on"),
    *_layer("_disable_adapters _active_adapter", "start out with an adapter that is active"),
    *_layer("get_base_weight set_base_weight", "merge an adapter into quantized layers, too"),
]
MODEL = private("PeftModel", "_enable_peft_forward_hooks", "mix adapters in one batch", _EXTENSIONS, anywhere=True)
FUNCTIONS = [
    *_function("_maybe_include_all_linear_layers", "know what all-linear stands for"),
    *_function("_get_in_out_features", "know the size of a quantized layer"),
    *_function("check_adapters_to_merge", "merge an adapter", anywhere=True),
]
ENUM = private(
    "PeftType",
    "_member_map_ _value2member_map_ _member_names_ _name_ _value_",
    "have PEFT before 0.21 save adapters of a method that is not in its enum",
    "PEFT 0.21 as the oldest release",
)
PRIVATE: list[Private] = [*MAPPINGS, *TUNER, *LAYER, *MODEL, *FUNCTIONS, *ENUM]


def check_peft() -> None:
    """Raise an UnsupportedEngineError, with the release to install, unless PEFT has what the tuner needs."""
    from peft import PeftModel, mapping
    from peft.tuners import tuners_utils
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for owner, entries in (
        (mapping, MAPPINGS),
        (BaseTuner, TUNER),
        (BaseTunerLayer, LAYER),
        (PeftModel, MODEL),
        (tuners_utils, FUNCTIONS),
    ):
        require_private("peft", owner, entries)


def register_tuner(
    kind: Any, config: type, tuner: type[BaseTuner], check: Callable[[nn.Module, str, Mapping[str, Tensor]], None]
) -> None:
    """Make PEFT know a method that is not in its enum.

    Args:
        kind: A str enum's member that looks like one of `PeftType`.
        check: Called before an adapter is saved by a release whose tuners are not asked what to save: with the model,
            the adapter's name and the state dict that it is saved from.
    """
    from peft import mapping

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = tuner.prefix
    if is_older("peft", "0.21"):
        teach_saving(kind.value, check)


def teach_saving(kind: str, check: Callable[[nn.Module, str, Mapping[str, Tensor]], None]) -> None:
    """Have PEFT before 0.21 save adapters of a method that is not in its enum, and have them checked first.

    There a tuner is not asked what to save of it: one function goes through PEFT's own methods, by name. Biases that
    train with an adapter it knows of its own methods only.

    Args:
        kind: The method's name.
        check: As `register_tuner`'s.
    """
    import peft
    from peft.utils import PeftType

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
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if which == "none":
        return {}
    layers = [
        (name, m) for name, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    adapted = {f"{name}.base_layer.bias" for name, m in layers if isinstance(m, BaseTunerLayer)}
    wrapped = tuple(f"{name}." for name, m in layers if not isinstance(m, BaseTunerLayer))
    biases = {name for name in state_dict if name.endswith(".bias") and not name.startswith(wrapped)}
    return {name: state_dict[name] for name in (biases if which == "all" else biases & adapted)}


def in_out_features(layer: nn.Module) -> tuple[int | None, int | None]:
    """The sizes of a linear layer, quantized ones included; None for other modules."""
    from peft.tuners.tuners_utils import _get_in_out_features

    return _get_in_out_features(layer)


def with_all_linear(config: Any, model: nn.Module) -> Any:
    """A tuner's configuration with "all-linear" replaced by what it stands for in a model."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    return _maybe_include_all_linear_layers(config, model)
