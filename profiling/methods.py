"""Fine-tuning methods over one shared frozen backbone, each ready to take a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, MissConfig, RandLoraConfig, VeraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from aflora_dist.adapter.architectures import target_modules

REFERENCES = ("floor", "full", "lora", "adalora", "elora", "aflora_training", "aflora_half", "aflora_frozen")
MORE_OF_PEFT = ("miss", "lorafa", "dora", "randlora")  # not on every layer and not in every dtype
BUILT_IN = (*REFERENCES, *MORE_OF_PEFT)


class _OutputCast:
    """Forward hook: gives an output the dtype that autocast gives the layers around it.

    PEFT's VeRA, MiSS and RandLoRA return float32 from a float32 input under autocast, where a plain Linear returns
    bfloat16; DeBERTa-v2 then fails in its attention mask, which it fills with the lowest number of another dtype.

    Attributes:
        used: An output had to be cast.
    """

    def __init__(self) -> None:
        self.used = False
        self.handles: list[RemovableHandle] = []

    def remove_if_unused(self) -> None:
        """After a step: nobody shall be slowed down by what only others need."""
        if not self.used:
            for handle in self.handles:
                handle.remove()

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        device = output.device.type
        if not torch.is_autocast_enabled(device) or output.dtype == torch.get_autocast_dtype(device):
            return None
        self.used = True
        return output.to(torch.get_autocast_dtype(device))


def match_autocast(model: nn.Module) -> _OutputCast:
    """Have the adapted layers of a PEFT model return what autocast would; the hook says whether it was needed."""
    hook = _OutputCast()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            hook.handles.append(module.register_forward_hook(hook))
    return hook


@dataclass
class Method:
    """One method's model and optimizer.

    Attributes:
        adapted: The modules around the adapted linear layers (for the floor: the layers themselves).
        output_cast: See `match_autocast`.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer | None
    adapted: list[nn.Module]
    after_step: Callable[[], None] = lambda: None
    output_cast: _OutputCast = field(default_factory=_OutputCast)
    freezing: AdaptiveFreezing | None = None
    seconds: list[float] = field(default_factory=list)

    def trainable_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def optimizer_state_bytes(self) -> int:
        if self.optimizer is None:
            return 0
        states: Any = self.optimizer.state.values()
        return sum(v.nbytes for s in states for v in s.values() if isinstance(v, Tensor) and v.dim() > 0)

    def step(self, batch: dict[str, Tensor], accelerator: Accelerator) -> None:
        """Forward, backward, and the update."""
        loss = self.model(**batch).loss
        accelerator.backward(loss)
        if self.optimizer is not None:
            self.optimizer.step()
            self.after_step()
            self.optimizer.zero_grad(set_to_none=True)


def shared_copy(model: nn.Module) -> Any:
    """A copy of the module tree that shares the weights."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def create(name: str, base: nn.Module, accelerator: Accelerator) -> Method:
    """Set one method up. All methods adapt the same layers: attention and feed-forward of every block.

    Raises:
        SystemExit: No such method of PEFT, or it cannot be set up on these layers.
    """
    targets = target_modules(base.config.model_type)  # type: ignore[union-attr, arg-type]
    after: Callable[[], None] = lambda: None  # noqa: E731
    cast = _OutputCast()
    model: Any
    if name == "floor":
        model, adapted = _floor(base, targets)
        return Method(name, accelerator.prepare(model), None, adapted)
    if name == "full":
        model = copy.deepcopy(base).requires_grad_(True)
        adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
    else:
        try:
            model = get_peft_model(shared_copy(base), _config(name, targets))
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{name}: PEFT cannot set it up on these layers: {error}") from None
        if not name.startswith("aflora"):
            cast = match_autocast(model)
        adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
        if name == "adalora":
            tuner = model.base_model
            counter = iter(range(1, 10**9))
            after = lambda: tuner.update_and_allocate(next(counter))  # noqa: E731
    model.train()
    if name == "lorafa":
        optimizer: Any = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-4)  # freezes A
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    method = Method(name, prepared, optimizer, adapted, after, cast)
    if name.startswith("aflora"):
        never = FreezingConfig(total_steps=10**9, initial_steps=10**9 - 1, final_steps=0)
        method.freezing = AdaptiveFreezing(accelerator, prepared, optimizer, never)
    return method


def freeze_share(method: Method) -> None:
    """Freeze half or all of the matrices of "aflora_half" and "aflora_frozen"."""
    assert method.freezing is not None
    remaining = method.freezing.remaining
    if method.name == "aflora_half":
        method.freezing.freeze([name for i, name in enumerate(remaining) if i % 4 < 2])  # A and B of every other layer
    elif method.name == "aflora_frozen":
        method.freezing.freeze(list(remaining))


def _floor(base: nn.Module, targets: list[str]) -> tuple[nn.Module, list[nn.Module]]:
    """The frozen backbone: forward, and backward as far down as the first adapted layer's output."""
    model = shared_copy(base).train()
    adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
    for module in adapted:
        module.register_forward_hook(lambda module, inputs, output: _start_gradient(output))
    return model, adapted


def _start_gradient(output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()


def _is_target(name: str, targets: list[str]) -> bool:
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def _config(name: str, targets: list[str]) -> Any:
    if name.startswith("aflora"):
        return AFLoRAConfig(r=4, target_modules=targets)
    if name in ("lora", "lorafa", "dora"):
        return LoraConfig(r=8, lora_alpha=8, use_dora=name == "dora", target_modules=targets)
    if name == "adalora":
        return AdaLoraConfig(init_r=12, target_r=8, tinit=1, tfinal=1, total_step=10**6, target_modules=targets)
    if name == "elora":
        return VeraConfig(r=1024, target_modules=targets)
    if name == "miss":
        return MissConfig(r=16, target_modules=targets)  # one matrix a layer: as many parameters as LoRA with r = 8
    if name == "randlora":
        return RandLoraConfig(r=32, target_modules=targets)  # PEFT's default; about LoRA's number of parameters, too
    kinds = {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        raise SystemExit(
            f"There is no method {name!r}. Methods: {', '.join(BUILT_IN)}; of PEFT: {', '.join(sorted(kinds))}."
        )
    return kinds[name](target_modules=targets)


__all__ = ["BUILT_IN", "MORE_OF_PEFT", "REFERENCES", "Method", "create", "freeze_share", "match_autocast"]
