"""PEFT's private interfaces that the adapter uses (see aflora_dist/contract.py)."""

from __future__ import annotations

from ..contract import Private

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
        ("_post_injection_hook", "refuse an adapter with nothing to train and freeze"),
        ("_cast_adapter_dtype", "give the adapter of a sharded model its dtype"),
        ("get_model_config", "know the architecture"),
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
FUNCTIONS = [
    Private("peft.tuners.tuners_utils", "_get_in_out_features", "know the size of a quantized layer", _TUNER),
    Private("peft.tuners.tuners_utils", "check_adapters_to_merge", "merge an adapter", _TUNER),
]
PRIVATE = {"peft": MAPPINGS + TUNER + LAYER + FUNCTIONS}
