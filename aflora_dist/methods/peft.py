"""Any of PEFT's methods as one of `aflora train`, by name and with its own options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PromptLearningConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn

from ..adapter.architectures import find_targets, outside_body
from ..adapter.labels import label_mapping
from ..adapter.precision import widen
from ..adapter.saving import save_peft
from ..compat.deepspeed import is_sharded
from ..errors import AFLoRAError, UnsupportedEngineError, one_line
from ..names import is_head
from ..options import Config
from .autocast import match_autocast
from .base import FreezingMethod

# What `aflora train` or PEFT itself sets, and no option.
_OURS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_OURS |= {"inference_mode", "runtime_config"}
_OWN_TARGETS = {"ln_tuning", "trainable_tokens"}  # they train norms and embeddings, not linear layers
_NOT_HERE = {
    "adaption_prompt": "it puts learned tokens into the attention of one kind of model, which no adapted layer holds",
    "poly": "it needs to be told the task of each example, and aflora train has one task",
    "shadow": "it replaces what the model's blocks hand on, which the adapted layers of other models do not expect",
    "xlora": "it mixes adapters that were trained before, and aflora train begins with none",
}


def known_methods() -> dict[str, Any]:
    """PEFT's methods: configuration classes by the names that its adapter_config.json writes, in lower case."""
    kinds = {str(getattr(kind, "value", kind)).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kinds.pop("aflora", None)  # ours, which has options of its own
    return kinds


# What PEFT raises for options of other types, or that do not go together.
_REFUSED = (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError, AssertionError)
_WITHOUT_WEIGHTS = (RuntimeError, NotImplementedError)  # where a model has shapes alone


class PeftMethod(FreezingMethod):
    """What trains by PEFT, AFLoRA too, beside a head that trains whole."""

    @property
    def task_type(self) -> TaskType:
        return TaskType.CAUSAL_LM if self.config.data.task == "sft" else TaskType.SEQ_CLS

    def whole(self, head: Sequence[str]) -> list[str]:
        """The modules to save: PEFT adds the usual heads of classifiers itself."""
        return [name for name in head if name not in SEQ_CLS_HEAD_NAMES]

    def put_in(self, model: Any, tuning: Callable[[], PeftConfig], **options: Any) -> PeftModel:
        """The model with an adapter; an AFLoRAError says why PEFT cannot put it in."""
        planned = any(parameter.is_meta for parameter in model.parameters())
        try:
            config = tuning()
            if self.task_type == TaskType.SEQ_CLS and model.config.num_labels > 1:
                config.auto_mapping = label_mapping([name for _, name in sorted(model.config.id2label.items())])
            if planned and str(getattr(config, "init_lora_weights", "")).startswith(("pissa", "olora")):
                config.init_lora_weights = True  # these take weights, to the same shapes
            return get_peft_model(model, config, **options)
        except AFLoRAError:
            raise
        except (*_REFUSED, *_WITHOUT_WEIGHTS) as error:
            if isinstance(error, _WITHOUT_WEIGHTS) and planned:
                raise AFLoRAError(
                    f"{self.name} cannot be planned: PEFT begins it with the model's weights, which a plan does not "
                    f"load ({one_line(error)})."
                ) from error
            if not isinstance(error, _REFUSED):
                raise
            raise AFLoRAError(f"PEFT cannot put {self.name} into this model: {one_line(error)}") from error

    def is_head(self, name: str) -> bool:
        return is_head(name)

    def save(self, model: Any, folder: Path, values: Mapping[str, Tensor]) -> None:
        save_peft(model, folder, values, save_embedding_layers=False)


class Peft(PeftMethod):
    """A method of PEFT on the layers that AFLoRA adapts: nothing happens to it while it trains, unless it is to freeze.

    Raises:
        AFLoRAError: PEFT has no such method, it has no such option, or `aflora train` cannot train it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.name = config.method.name
        self.options = dict(config.method.options)
        kinds = known_methods()
        if self.name not in kinds:
            able = [name for name, kind in kinds.items() if not _refusal(name, kind)]
            raise AFLoRAError(
                f"There is no method {self.name!r}. method.name is aflora, full, or one of PEFT's: "
                f"{', '.join(sorted(able))}."
            )
        self.kind = kinds[self.name]
        if reason := _refusal(self.name, self.kind):
            raise AFLoRAError(f"aflora train cannot train method.name={self.name}: {reason}.")
        for option in self.options:
            self._check_option(option)
        if self.options.get("use_asa"):
            raise AFLoRAError(
                f"method.options use_asa: {self.name} would have to be told of every update, which aflora train does "
                f"for adalora alone. Leave it out."
            )
        if self.options.get("alora_invocation_tokens") and config.data.task != "sft":
            raise AFLoRAError(
                "method.options alora_invocation_tokens: PEFT looks for these tokens in language models alone, and "
                "would train nothing of a classifier's adapter. Leave it out, or train with data.task=sft."
            )
        if self.options.get("alora_invocation_tokens") and config.data.packing:
            raise AFLoRAError(
                "method.options alora_invocation_tokens: PEFT looks for their last place in a row, and data.packing "
                "lays several examples in one, of which all but the last would train as that one says. Leave packing "
                "out."
            )
        if (start := str(self.options.get("init_lora_weights", "")).lower()) in ("eva", "corda"):
            raise AFLoRAError(
                f"method.options init_lora_weights={start} is computed of training data by a call of peft's, which "
                f"aflora train does not make: it would begin as plain LoRA, or not at all. Take pissa or olora, or "
                f"leave it out."
            )
        self._prefix = ""
        self._shared: list[str] = []

    def _check_option(self, option: str) -> None:
        known = sorted(f.name for f in dataclasses.fields(self.kind) if f.init and f.name not in self._set_here())
        if option in self._set_here():
            raise AFLoRAError(f"method.options {option} is set by aflora train. Leave it out.")
        if option not in known:
            raise AFLoRAError(
                f"{self.kind.__name__} has no option {option!r}. method.options of {self.name}: {', '.join(known)}."
            )

    def _set_here(self) -> set[str]:
        return _OURS

    def adapt(self, model: Any, head: Sequence[str]) -> PeftModel:
        # DeepSpeed has what trains in one dtype, the model's, where `from_pretrained` sharded it for ZeRO-3.
        sharded = any(is_sharded(parameter) for parameter in model.parameters())
        adapted = self.put_in(
            model, lambda: self.kind(**self._arguments(model, head)), autocast_adapter_dtype=not sharded
        )
        self._prefix = str(getattr(adapted.base_model, "prefix", "")) or f"{self.name}_"
        self._shared = _shared(adapted)
        widen(adapted.get_base_model(), [p for p in adapted.parameters() if p.requires_grad])
        match_autocast(adapted)
        return adapted

    def _arguments(self, model: Any, head: Sequence[str]) -> dict[str, Any]:
        """What the method's configuration is made of."""
        fields = {field.name for field in dataclasses.fields(self.kind)}
        arguments = {**self.options, "task_type": self.task_type}
        # As with AFLoRA, the head trains whose weights a checkpoint for as many classes has, too, however it is called.
        parts = outside_body(model) if self.task_type == TaskType.SEQ_CLS else []
        whole = self.whole([*dict.fromkeys([*head, *parts])])
        whole += [name for name in arguments.get("modules_to_save") or [] if name not in whole]
        if "modules_to_save" in fields:
            arguments["modules_to_save"] = whole or None
        elif head:
            raise AFLoRAError(f"{self.name} trains nothing beside it, and the head ({', '.join(head)}) is new.")
        chooses = arguments.get("target_modules") or arguments.get("target_parameters")
        if "target_modules" in fields and not chooses and self.name not in _OWN_TARGETS:
            arguments |= self._targets(model, fields)
        return arguments

    def _targets(self, model: Any, fields: set[str]) -> dict[str, Any]:
        if (found := find_targets(model)) is None:
            raise AFLoRAError(
                f"Which layers of a {model.config.model_type!r} model to adapt is not known here: name them, as in "
                f"""--method.options '{{"target_modules": ["q_proj", "v_proj"]}}'."""
            )
        chosen: dict[str, Any] = {"target_modules": [*dict.fromkeys([*found["attention"], *found["ffn"]])]}
        if "feedforward_modules" in fields and "feedforward_modules" not in self.options:  # IA3
            chosen["feedforward_modules"] = found["ffn"]
        return chosen

    def check_engine(self, kind: str, precision: str) -> None:
        if kind == "fsdp2" and self._shared:
            raise UnsupportedEngineError(
                f"{self.name} shares a trained parameter between layers ({self._shared[0]}), and FSDP2 shards each "
                f"layer's own. Use launch/ddp.yaml or launch/zero2.yaml, or method.name=lora."
            )

    def saved(self, name: str, trains: bool) -> bool:
        return trains or is_head(name) or self._prefix in name  # PEFT leaves out what it does not need


def _shared(model: nn.Module) -> list[str]:
    """Trained parameters that several modules hold, as vblora's vector bank or lily's matrices."""
    first = {id(p) for p in model.parameters() if p.requires_grad}
    own = {name for name, _ in model.named_parameters()}
    return [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in first and n not in own]


def _refusal(name: str, kind: Any) -> str:
    """Why `aflora train` cannot train a method of PEFT; empty if it can."""
    if issubclass(kind, PromptLearningConfig):
        return (
            "it learns tokens that stand before the text instead of layers, and they would shift the positions by "
            "which texts are distributed and loss is counted. Adapt layers, as with lora, or use transformers' Trainer"
        )
    return _NOT_HERE.get(name, "")
