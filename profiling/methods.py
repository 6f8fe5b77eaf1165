"""Fine-tuning methods over one shared frozen backbone, each ready to take a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn
from torch.optim import Optimizer

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, FreezingConfig
from aflora_dist.adapter.architectures import target_modules

BUILT_IN = ("floor", "full", "lora", "adalora", "elora", "aflora_training", "aflora_half", "aflora_frozen")


@dataclass
class Method:
    """One method's model and optimizer.

    Attributes:
        adapted: The modules around the adapted linear layers (for the floor: the layers themselves).
    """

    name: str
    model: nn.Module
    optimizer: Optimizer | None
    adapted: list[nn.Module]
    after_step: Callable[[], None] = lambda: None
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
    if name == "floor":
        return Method(name, *_floor(base, targets))
    if name == "full":
        model: Any = copy.deepcopy(base).requires_grad_(True)
        adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
    else:
        try:
            model = get_peft_model(shared_copy(base), _config(name, targets))
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"{name}: PEFT cannot set it up on these layers: {error}") from None
        adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
        if name == "adalora":
            tuner = model.base_model
            counter = iter(range(1, 10**9))
            after = lambda: tuner.update_and_allocate(next(counter))  # noqa: E731
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    method = Method(name, prepared, optimizer, adapted, after)
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


def _floor(base: nn.Module, targets: list[str]) -> tuple[nn.Module, None, list[nn.Module]]:
    """The frozen backbone: forward, and backward as far down as the first adapted layer's output."""
    model = shared_copy(base).train()
    adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
    for module in adapted:
        module.register_forward_hook(lambda module, inputs, output: _start_gradient(output))
    return model, None, adapted


def _start_gradient(output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()


def _is_target(name: str, targets: list[str]) -> bool:
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def _config(name: str, targets: list[str]) -> Any:
    if name.startswith("aflora"):
        return AFLoRAConfig(r=4, target_modules=targets)
    if name == "lora":
        return LoraConfig(r=8, target_modules=targets)
    if name == "adalora":
        return AdaLoraConfig(init_r=12, target_r=8, tinit=1, tfinal=1, total_step=10**6, target_modules=targets)
    if name == "elora":
        return VeraConfig(r=1024, target_modules=targets)
    kinds = {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        raise SystemExit(
            f"There is no method {name!r}. Methods: {', '.join(BUILT_IN)}; of PEFT: {', '.join(sorted(kinds))}."
        )
    return kinds[name](target_modules=targets)


__all__ = ["BUILT_IN", "Method", "create", "freeze_share"]
