"""The PEFT tuner: puts an `AFLoRALayer` around every target and decides whose matrices may train."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import mapping
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ..contract import require
from ..errors import AFLoRAError
from ..names import AdapterTensor
from ..processes import refuse_lonely_processes
from . import private
from .architectures import ARCHITECTURES, kind_of, target_modules
from .config import AFLoRAConfig, AFLoRAPeftType
from .folding import Folding
from .layer import AFLoRALayer

_SHORTHANDS = ("ffn", "attention", "all", "none")


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


class AFLoRAModel(BaseTuner):
    """Created by `peft.get_peft_model(model, AFLoRAConfig(...))`.

    Attributes:
        freezing_attached: Set by `AdaptiveFreezing`. While it is False, an adapter whose matrices
            are to freeze adaptively refuses its second training step, so that the freezing cannot
            be forgotten unnoticed.
        freezing_waived: Set by `AdaptiveFreezing.detach()`: the user wants the rest to train to the end.
    """

    prefix = "aflora"
    tuner_layer_cls = AFLoRALayer
    target_module_mapping: dict[str, list[str]] = {  # noqa: RUF012  # declared so by PEFT
        name: target_modules(name) for name in ARCHITECTURES
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_lonely_processes()  # here it can be said in time: prepare() would fail with less to go by
        super().__init__(*args, **kwargs)
        self.freezing_attached = False
        self.freezing_waived = False
        self._training_forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled() and not (self.freezing_attached or self.freezing_waived):
            self._refuse_forgotten_freezing()
        return self.model(*args, **kwargs)

    def _refuse_forgotten_freezing(self) -> None:
        if not self.freezable_matrices():
            return
        self._training_forwards += 1
        if self._training_forwards > 1:
            raise RuntimeError(
                "This AFLoRA adapter freezes adaptively, but nothing freezes it: create "
                "aflora_dist.AdaptiveFreezing(accelerator, model, optimizer, ...) after accelerator.prepare() "
                "(with Trainer: add aflora_dist.FreezingCallback), or set AFLoRAConfig(freezing='never') to "
                "train all matrices to the end."
            )

    def freezable_matrices(self) -> dict[str, nn.Parameter]:
        """The projection matrices of the active adapters that train and are yet to freeze, by name.

        Names are relative to the tuner (`self`), in the order of the model's modules.
        """
        adaptive = [name for name in self.active_adapters if self.peft_config[name].freezing == "adaptive"]
        return {
            str(AdapterTensor(module_name, adapter, matrix)): path.get_parameter(matrix)
            for module_name, layer in self.named_modules()
            if isinstance(layer, AFLoRALayer)
            for adapter in adaptive
            if adapter in layer.aflora
            for path in [layer.path(adapter)]
            for matrix in ("A", "B")
            if matrix not in path.frozen
        }

    def _prepare_adapter_config(self, peft_config: AFLoRAConfig, model_config: dict[str, Any]) -> AFLoRAConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in ARCHITECTURES:
            raise AFLoRAError(
                f"AFLoRA does not know the architecture {model_config.get('model_type', type(self.model).__name__)!r}. "
                f"Pass target_modules=[...] to AFLoRAConfig; the model's linear layers end in: "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in _linear_layers(self.model)})) or '(none)'}."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _may_train(self, config: AFLoRAConfig, module_name: str) -> bool:
        """Whether the projection matrices of this layer train at all (`freezable` and `freezing`)."""
        if config.freezing == "always" or config.freezable == "none":
            return False
        if config.freezable == "all":
            return True
        if config.freezable not in _SHORTHANDS:
            return re.fullmatch(config.freezable, module_name) is not None
        return kind_of(self._model_type(), module_name) == config.freezable

    def _model_type(self) -> str | None:
        return self.get_model_config(self.model).get("model_type")

    def _post_injection_hook(self, model: nn.Module, config: AFLoRAConfig, adapter_name: str) -> None:
        """Have the layers folded together from now on. Refuse a `freezable` that selects nothing, saying what is."""
        Folding.attach(model, [module for module in model.modules() if isinstance(module, AFLoRALayer)])
        wants_matrices = config.freezing != "always" and config.freezable != "none"
        layers = {n: m for n, m in model.named_modules() if isinstance(m, AFLoRALayer) and adapter_name in m.aflora}
        if not wants_matrices or any(self._may_train(config, name) for name in layers):
            return
        model_type = self._model_type()
        if config.freezable in ("ffn", "attention") and model_type not in ARCHITECTURES:
            raise AFLoRAError(
                f"AFLoRA does not know which layers of {model_type or type(model).__name__!r} are {config.freezable}. "
                f'Set AFLoRAConfig(freezable=...) to "all", "none" or a regular expression over module names such as '
                f"{next(iter(layers))!r}."
            )
        kinds = sorted({str(kind_of(model_type, name)) for name in layers})
        raise AFLoRAError(
            f"AFLoRA has nothing to train and freeze: freezable={config.freezable!r} matches none of the "
            f"{len(layers)} adapted layers (kinds: {', '.join(kinds)}; the first is {next(iter(layers))!r}). "
            f'Widen target_modules or freezable, or say freezable="none".'
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT has it; but where `from_pretrained` sharded the model for ZeRO-3, the adapter takes its dtype.

        DeepSpeed casts a model to half precision whole, unless it is sharded: then it takes all of it to be cast
        already. What trains must have one dtype; master weights are float32 in either case.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        sharded = next((p for p in self.model.parameters() if private.is_sharded(p)), None)
        if sharded is None:
            return
        for layer in self.model.modules():
            if isinstance(layer, AFLoRALayer) and adapter_name in layer.aflora:
                layer.path(adapter_name).to(sharded.dtype)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: AFLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target if isinstance(target, AFLoRALayer) else self._wrap(target, adapter_name)
        layer.update_layer(
            adapter_name,
            r=config.r,
            d_initial=config.d_initial,
            dropout=config.aflora_dropout,
            frozen=set() if self._may_train(config, current_key) else {"A", "B"},
            init_weights=config.init_weights,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter does not start out trainable
            self._replace_module(parent, target_name, layer, target)

    def unload(self) -> nn.Module:
        model = super().unload()
        Folding.detach(model)
        return model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().merge_and_unload(*args, **kwargs)
        Folding.detach(model)
        return model

    def _wrap(self, target: nn.Module, adapter_name: str) -> AFLoRALayer:
        if not isinstance(target, (nn.Linear, Conv1D)) and resolve_quantization_backend(target) is None:
            raise TypeError(
                f"AFLoRA adapts Linear and Conv1D layers (quantized ones too); a target is {type(target).__name__}. "
                f"Name only linear layers in target_modules."
            )
        return AFLoRALayer(target, adapter_name, **get_quantization_kwargs(self))


def register() -> None:
    """Make PEFT know the method: get_peft_model, save_pretrained and from_pretrained work then.

    Called by aflora_dist/_registration.py, once PEFT has been imported.
    """
    for owner, entries in (
        (mapping, private.MAPPINGS),
        (BaseTuner, private.TUNER),
        (BaseTunerLayer, private.LAYER),
        (tuners_utils, private.FUNCTIONS),
    ):
        require("peft", owner, entries)
    for part, entries in (
        (torch._C, private.BACKWARD),
        (torch._C._autograd, private.SAVED),
        (torch_module, private.GLOBAL_HOOKS),
        (nn.Module(), private.HOOKS),
    ):
        require("torch", part, entries)
    kind: Any = AFLoRAPeftType.AFLORA
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = AFLoRAConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = AFLoRAModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = AFLoRAModel.prefix
