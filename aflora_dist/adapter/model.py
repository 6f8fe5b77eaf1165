"""The PEFT tuner: puts an `AFLoRALayer` around every target and decides whose matrices may train."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compat import peft as compat_peft
from ..compat import torch as compat_torch
from ..compat.deepspeed import is_sharded
from ..compat.transformers import refuse_own_loading
from ..errors import AFLoRAError
from ..names import unwrapped, without_wrappers
from ..processes import refuse_lonely_processes
from .architectures import kind_of, linear_layers, outside_body, target_modules
from .config import AFLoRAConfig, AFLoRAPeftType
from .folding import Folding
from .guard import FreezingGuard
from .layer import AFLoRALayer, AFLoRALinear
from .precision import widen
from .saving import check_complete, know_who_writes

_SHORTHANDS = ("ffn", "attention", "all", "none")
_HEADS = {"lm_head", *SEQ_CLS_HEAD_NAMES}
_CLASSIFIERS = {TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS}


def _linear_endings(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, its heads left out."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = (name for name in linear_layers(model) if model.get_submodule(name) is not head)
    return sorted({name.rpartition(".")[2] for name in linear} - _HEADS)


class AFLoRAModel(BaseTuner):
    """Created by `peft.get_peft_model(model, AFLoRAConfig(...))`.

    Attributes:
        guard: Refuses a second training step while no `AdaptiveFreezing` is attached, so that the freezing cannot be
            forgotten unnoticed.
    """

    prefix = "aflora"
    tuner_layer_cls = AFLoRALayer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        configs = peft_config.values() if isinstance(peft_config, Mapping) else [peft_config]
        if not all(config.inference_mode for config in configs):  # who only infers may do so process by process
            refuse_lonely_processes()  # here it can be said in time: prepare() would fail with less to go by
        known = set(getattr(model, "peft_config", None) or ())
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:  # PEFT has noted the adapter on the model already, if the model had others
            if known and adapter_name not in known:
                model.peft_config.pop(adapter_name, None)  # type: ignore[operator, union-attr]
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT has it, for the first adapter and for each further one; then all layers fold and freeze together."""
        guards = (m.guard for m in model.modules() if isinstance(m, AFLoRALayer))
        self.guard = next(guards, None) or FreezingGuard()
        config = self.peft_config[adapter_name]
        known = config.inference_mode or kwargs.get("state_dict") is not None  # what is loaded says itself what it has
        if config.task_type in _CLASSIFIERS and not known and (head := outside_body(model)):
            whole = dict.fromkeys([*(config.modules_to_save or ()), *head])
            # A layer of a head that trains whole is in it: with a copy of its own, PEFT could not load the adapter.
            config.modules_to_save = [n for n in whole if not n.startswith(tuple(f"{outer}." for outer in whole))]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        Folding.attach(model, [m for m in model.modules() if isinstance(m, AFLoRALayer)])
        self._guard_compiled()

    def _guard_compiled(self) -> None:
        """One layer's parameter is enough to learn of backward passes."""
        layers = [module for module in self.model.modules() if isinstance(module, AFLoRALayer)]
        paths = [(layer, layer.path(name)) for layer in layers for name in layer.aflora]
        found = next((one for one in paths if one[1].to_freeze() and one[1].s_b.requires_grad), None)
        if found is not None:
            self.guard.watch_compiled(found[0], found[1].s_b)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What is saved of an adapter: all of it, or an error on the rank that would write less."""
        state_dict = {unwrapped(key): tensor for key, tensor in state_dict.items()}
        with without_wrappers(model):
            found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        check_complete(model, adapter_name, found)
        return found

    def _prepare_adapter_config(self, peft_config: AFLoRAConfig, model_config: dict[str, Any]) -> AFLoRAConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = target_modules(self.model) or None
        if peft_config.target_modules is None:
            endings = _linear_endings(self.model)
            model_type = model_config.get("model_type") or type(self.model).__name__
            raise AFLoRAError(
                f"AFLoRA does not know the architecture {model_type!r}. Say which layers to adapt, and which of these "
                f"may train and freeze: AFLoRAConfig(target_modules=[...], freezable=...). The model's linear layers "
                f"end in: {', '.join(endings) or '(none)'}; freezable is "
                f'"all", "none" or a regular expression over module names.'
            )
        return peft_config

    def _prepare_model(self, peft_config: AFLoRAConfig, model: nn.Module) -> None:
        """Changes nothing. Refuses what cannot be, while the model is still as it was."""
        refuse_own_loading()
        config: Any = compat_peft.with_all_linear(peft_config, model)
        adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(adapters) and self._check_target_module_exists(config, name)
        }
        for name, module in targets.items():
            self._check_target_module_compatiblity(config, model, name.rpartition(".")[2])
            _refuse_other_modules(name, module)
        if targets:
            self._refuse_nothing_to_freeze(config, list(targets), model)
        elif adapters:  # where there is none PEFT says so, before 0.21 of a first adapter alone
            raise AFLoRAError(
                f"No modules were targeted: target_modules={config.target_modules!r} names none of the model."
            )

    def _may_train(self, config: AFLoRAConfig, module_name: str) -> bool:
        """Whether the projection matrices of this layer train at all (`freezable` and `freezing`)."""
        if config.freezing == "always" or config.freezable == "none":
            return False
        if config.freezable == "all":
            return True
        if config.freezable not in _SHORTHANDS:
            return re.fullmatch(config.freezable, module_name) is not None
        return kind_of(module_name) == config.freezable

    def _refuse_nothing_to_freeze(self, config: AFLoRAConfig, targets: list[str], model: nn.Module) -> None:
        wants_matrices = config.freezing != "always" and config.freezable != "none"
        if not wants_matrices or any(self._may_train(config, name) for name in targets):
            return
        kinds = sorted({str(kind_of(name)) for name in targets})
        if config.freezable in ("ffn", "attention") and kinds == ["None"]:
            raise AFLoRAError(
                f"AFLoRA does not know which layers of {type(model).__name__} are {config.freezable}. "
                f'Set AFLoRAConfig(freezable=...) to "all", "none" or a regular expression over module names such as '
                f"{targets[0]!r}."
            )
        experts = any(".experts." in name and p.dim() == 3 for name, p in model.named_parameters())
        raise AFLoRAError(
            f"AFLoRA has nothing to train and freeze: freezable={config.freezable!r} matches none of the "
            f"{len(targets)} adapted layers (kinds: {', '.join(kinds)}; the first is {targets[0]!r}). "
            + ("The experts' weights of this model are bare parameters, which AFLoRA cannot adapt. " if experts else "")
            + 'Widen target_modules or freezable (for example to "all"), or say freezable="none".'
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT has it, and modules that train whole are cast, too; but where `from_pretrained` sharded the model
        for ZeRO-3, the adapter takes its dtype.

        DeepSpeed casts a model to half precision whole, unless it is sharded: then it takes all of it to be cast
        already. What trains must have one dtype; master weights are float32 in either case.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self._guard_compiled()  # it may have made new parameters
        sharded = next((p for p in self.model.parameters() if is_sharded(p)), None)
        if sharded is None:
            if autocast_adapter_dtype:
                whole = [m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)]
                copies = [m.modules_to_save[adapter_name] for m in whole if adapter_name in m.modules_to_save]
                widen(self.model, [p for module in copies for p in module.parameters()])
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
        if isinstance(target, AFLoRALayer):
            layer = target
        else:
            layer = AFLoRALinear(target, adapter_name, self.guard, **get_quantization_kwargs(self))
        layer.update_layer(
            adapter_name,
            r=config.r,
            d_initial=config.d_initial,
            dropout=config.aflora_dropout,
            frozen=set() if self._may_train(config, current_key) else {"A", "B"},
            init_weights=config.init_weights,
            adaptive=config.freezing == "adaptive" and config.freezable != "none",
        )
        if layer is not target:
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Its fast path in evaluation reads the base weights, and is not taken where there are hooks. What is
                # nested for that path has no shape.
                parent.register_forward_pre_hook(_calls_its_layers)
                for module in self.model.modules():
                    if isinstance(module, nn.TransformerEncoder) and any(m is parent for m in module.layers):
                        module.use_nested_tensor = False
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter does not start out trainable
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's copies a weight, too, which a module that trains whole (`modules_to_save`) may not have itself."""
        setattr(parent, child_name, new_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: PEFT before 0.21 calls its forward alone, past the hook that notes the shape of inputs."""
        return self.model(*args, **kwargs)

    def unload(self) -> nn.Module:
        model = super().unload()
        Folding.detach(model)
        return model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().merge_and_unload(*args, **kwargs)
        Folding.detach(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around each forward of a PeftModel: hands `adapter_names`, one for each example, on to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise AFLoRAError("adapter_names mixes adapters in a batch for inference only: call model.eval() first.")
        unknown = sorted({*names} - {*self.peft_config, "__base__"})
        if unknown:
            raise AFLoRAError(f"adapter_names: this model has no adapter {unknown[0]!r}; it has {[*self.peft_config]}.")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        config = self.get_model_config(self.model)
        # The beams of an encoder-decoder model part after its encoder.
        encoder = self.model.get_encoder() if config.get("is_encoder_decoder") else nn.Module()
        in_encoder = set(encoder.modules())
        shapes: list[torch.Size] = []  # (examples, positions) of what the model was given last
        handles = [self.model.register_forward_pre_hook(partial(_note_shapes, shapes), with_kwargs=True)]
        handles += [
            module.register_forward_pre_hook(
                # Experts are given tokens in an order of their own.
                partial(
                    _name_adapters, names if module in in_encoder else repeated, [] if ".experts." in name else shapes
                ),
                with_kwargs=True,
            )
            for name, module in self.named_modules()
            if isinstance(module, (AFLoRALayer, ModulesToSaveWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def _note_shapes(shapes: list[torch.Size], module: nn.Module, args: Any, kwargs: Any) -> None:
    found = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    shapes[:] = [tensor.shape[:2] for tensor in found if isinstance(tensor, torch.Tensor) and tensor.dim() > 1]


def _name_adapters(
    names: list[str], shapes: list[torch.Size], module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Hand the names on, where examples and positions are one dimension a name for each row of it."""
    rows = args[0].shape[:-1] if args and isinstance(args[0], torch.Tensor) else ()
    for examples, positions in shapes:
        if examples == len(names) and rows == (examples * positions,):
            names = [name for name in names for _ in range(positions)]
            break
    return args, {**kwargs, "adapter_names": names}


def _calls_its_layers(*_: Any) -> None:
    """A hook that does nothing."""


def _refuse_other_modules(name: str, module: nn.Module) -> None:
    """Unless the module can be adapted."""
    if isinstance(module, AFLoRALayer):
        return
    if isinstance(module, BaseTunerLayer):
        raise AFLoRAError(
            f"The layer {name!r} holds an adapter of another method already ({type(module).__module__}."
            f"{type(module).__name__}). Merge it first (model = model.merge_and_unload()), take it away "
            "(model = model.unload()), or leave the layer out with exclude_modules."
        )
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise AFLoRAError(
            f"{name!r} belongs to torch's nn.MultiheadAttention, which reads its weight and never calls it: an adapter "
            f"there would do nothing. Leave it out with exclude_modules."
        )
    if not isinstance(module, (nn.Linear, Conv1D)) and resolve_quantization_backend(module) is None:
        raise AFLoRAError(
            f"AFLoRA adapts Linear and Conv1D layers (quantized ones too); the target {name!r} is "
            f"{type(module).__name__}. Name only linear layers in target_modules."
        )


def register() -> None:
    """Make PEFT know the method: get_peft_model, save_pretrained and from_pretrained work then.

    Called by aflora_dist/_registration.py, once PEFT has been imported.
    """
    compat_peft.check_peft()
    compat_torch.check_torch()
    know_who_writes(PeftModel)
    know_who_writes(PreTrainedModel)
    compat_peft.register_tuner(AFLoRAPeftType.AFLORA, AFLoRAConfig, AFLoRAModel, check_complete)
