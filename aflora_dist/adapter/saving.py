"""Saving an adapter that is spread over ranks: what belongs to it, asked of PEFT; and PEFT's own folder, written.

Gathers nothing: values come whole, by name, from whoever knows where they lie.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..compat.deepspeed import whole_shape
from ..compat.torch import saved_buffers
from ..compat.transformers import saves_adapters
from ..errors import AFLoRAError
from ..names import named_modules, named_parameters, without_wrappers
from ..processes import rank
from .layer import AFLoRALayer


def names_to_save(model: Any) -> list[str]:
    """The parameters that `model.save_pretrained` writes, as `named_parameters()` calls them.

    Of a model with adapters PEFT chooses: what is frozen, `modules_to_save`, and embeddings that were resized belong to
    it. Of prompt learning nothing, which PEFT computes by itself. Of one without adapters, all.

    Raises:
        AFLoRAError: An adapter of ours is in a model that does not save adapters, or the model cannot be saved.
    """
    if not isinstance(model, PeftModel) and not saves_adapters(model):
        if not hasattr(model, "save_pretrained"):
            raise AFLoRAError(
                f"{type(model).__name__} has no save_pretrained(). Gather what it holds with "
                f"freezing.engine.gather(names), on every rank, and save that."
            )
        if not any(isinstance(module, AFLoRALayer) for module in model.modules()):
            return list(named_parameters(model))
        raise AFLoRAError(
            f"{type(model).__name__} holds an AFLoRA adapter, but does not save adapters. Put it in with "
            f"peft.get_peft_model(model, AFLoRAConfig(...)), or with the model's own add_adapter()."
        )
    chosen = {id(p) for adapter in model.peft_config for p in parameters_by_key(model, adapter).values()}
    return [name for name, p in named_parameters(model).items() if id(p) in chosen]


def parameters_by_key(model: Any, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """What the file of an adapter holds, as PEFT chooses: its keys, and the parameters whose values they are.

    Buffers that it holds, too, are left out.
    """
    named = named_parameters(model, remove_duplicate=False)  # PEFT's layer over attention makes its own anew each time
    blank = {p: torch.empty(whole_shape(p), device="meta") for p in named.values()}
    state = buffers(model) | {name: blank[p] for name, p in named.items()}
    whose = {id(value): p for p, value in blank.items()}
    with without_wrappers(model):
        chosen = get_peft_model_state_dict(model, state, adapter_name)
    return {key: whose[id(value)] for key, value in chosen.items() if id(value) in whose}


def state_dict_of(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT takes for a state dict: these values under every name that they have in the model, and its buffers."""
    whole = {name: value.contiguous() for name, value in values.items()}
    first: dict[int, str] = {}  # parameters that several layers share are asked for under each of their names
    for name, parameter in named_parameters(model, remove_duplicate=False).items():
        if (known := first.setdefault(id(parameter), name)) in whole:
            whole[name] = whole[known]
    return buffers(model) | whole


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict has besides parameters: no engine shards it."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach().cpu()
        for prefix, module in named_modules(model, remove_duplicate=False).items()
        for name, buffer in saved_buffers(module)
    }


def save_peft(model: Any, folder: Path, values: Mapping[str, Tensor], **options: Any) -> None:
    """Write PEFT's folder of an adapter, or that of a model without one; on the main process only.

    Args:
        model: Its own values may be elsewhere.
        values: Of all that is saved, whole, by name.
        options: Of `PeftModel.save_pretrained`.
    """
    state = state_dict_of(model, values)
    with without_wrappers(model):
        model.save_pretrained(str(folder), state_dict=state, **options)


def check_complete(model: nn.Module, adapter_name: str, found: Mapping[str, Tensor]) -> None:
    """Raise AFLoRAError if an adapter would be written without all of it: frozen A and B are learned, too.

    Who only asks is let through where a part is right: above rank 0, for whole state dicts are on the main process
    alone, and for tensors that know that they are shards, which torch's distributed checkpoints take.
    """
    for name, layer in named_modules(model).items():
        if not isinstance(layer, AFLoRALayer) or adapter_name not in layer.aflora:
            continue
        r, sizes = layer.r[adapter_name], (layer.in_features, layer.out_features)
        for tensor, numel in (("A", r * sizes[0]), ("B", r * sizes[1]), ("s_d", r), ("s_b", sizes[1])):
            key = f"{name}.aflora.{adapter_name}.{tensor}"
            value = found.get(key)
            there = None if value is None else _held(value)
            if there == numel or ((isinstance(value, DTensor) or rank() > 0) and not _WRITES.get()):
                continue
            raise AFLoRAError(
                f"The adapter would be saved without all of {key} "
                f"({'it is left out' if there is None else f'{there} of its {numel} elements'}): what is frozen is "
                f"learned, too. Call freezing.save_pretrained(folder) on every rank, of the AdaptiveFreezing; with "
                f"Trainer add aflora_dist.FreezingCallback, and call trainer.save_model."
            )


def _held(value: Tensor) -> int:
    """How many elements of a tensor are on this rank."""
    return (value.to_local() if isinstance(value, DTensor) else value).numel()


_WRITES: ContextVar[bool] = ContextVar("writes", default=False)
_SAYING: set[Any] = set()  # which say so already


def know_who_writes(owner: Any) -> None:
    """Have a class's save_pretrained say whether it writes: told is_main_process=False it only asks for what it would.

    PEFT's and transformers' do not tell a tuner, which they ask for its tensors.
    """
    original = owner.save_pretrained
    if original in _SAYING:
        return
    arguments = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = arguments.bind(self, *args, **kwargs).arguments
        token = _WRITES.set(bool(given.get("is_main_process", True)))
        try:
            return original(self, *args, **kwargs)
        finally:
            _WRITES.reset(token)

    _SAYING.add(save_pretrained)
    owner.save_pretrained = save_pretrained
