"""Fine-tuning methods over one shared frozen backbone, each ready to take a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from aflora_dist.adapter.architectures import target_modules
from aflora_dist.methods.autocast import OutputCast
from aflora_dist.methods.choose import create_method
from aflora_dist.options import AdapterConfig, Config, MethodConfig, TrainConfig

REFERENCES = ("floor", "full", "lora", "adalora", "elora", "aflora_training", "aflora_half", "aflora_frozen")
MORE_OF_PEFT = ("miss", "lorafa", "dora", "randlora")  # not on every layer and not in every dtype
BUILT_IN = (*REFERENCES, *MORE_OF_PEFT)
EPOCHS, UPDATES = 20, 10**6  # of AdaLoRA's schedule: longer than any measurement
_LORA = {"r": 8, "lora_alpha": 8}


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

    @property
    def casts_outputs(self) -> bool:
        """Whether layers return another dtype than autocast's, and are cast; known after the first step."""
        hooks = (hook for module in self.model.modules() for hook in module._forward_hooks.values())
        return any(isinstance(hook, OutputCast) for hook in hooks)

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
    targets = target_modules(base)
    if name == "floor":
        floor, adapted = _floor(base, targets)
        return Method(name, accelerator.prepare(floor), None, adapted)
    after: Callable[[], None] = lambda: None  # noqa: E731
    try:
        method = create_method(_config(name))
        model = method.adapt(copy.deepcopy(base) if name == "full" else shared_copy(base), [])
        method.check(UPDATES // EPOCHS)
    except AFLoRAError as error:
        raise SystemExit(f"{name}: {error}") from None
    if name != "full":
        for parameter_name, parameter in model.named_parameters():
            if method.is_head(parameter_name):
                parameter.requires_grad_(False)  # what is compared is the work of the adapters
    adapted = [m for n, m in model.named_modules() if _is_target(n, targets)]
    if name == "adalora":
        counter = iter(range(1, 10**9))
        after = lambda: model.base_model.update_and_allocate(next(counter))  # noqa: E731
    model.train()
    if name == "lorafa":
        optimizer: Any = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-4)  # freezes A
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ready = Method(name, prepared, optimizer, adapted, after)
    if name.startswith("aflora"):
        never = FreezingConfig(total_steps=10**9, initial_steps=10**9 - 1, final_steps=0)
        ready.freezing = AdaptiveFreezing(accelerator, prepared, optimizer, never)
    return ready


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


def _config(name: str) -> Config:
    """The main job's configuration of a method."""
    if name.startswith("aflora"):
        return Config(adapter=AdapterConfig(r=4))
    kind, options = {
        "lora": ("lora", _LORA),
        "lorafa": ("lora", _LORA),
        "dora": ("lora", {**_LORA, "use_dora": True}),
        "adalora": ("adalora", {"init_r": 12, "target_r": 8, "tinit": 1, "tfinal": 1}),
        "elora": ("vera", {"r": 1024}),
        "miss": ("miss", {"r": 16}),  # one matrix a layer: as many parameters as LoRA with r = 8
        "randlora": ("randlora", {"r": 32}),  # PEFT's default; about LoRA's number of parameters, too
    }.get(name, (name, {}))
    return Config(method=MethodConfig(name=kind, options=options), train=TrainConfig(epochs=EPOCHS))


__all__ = ["BUILT_IN", "MORE_OF_PEFT", "REFERENCES", "Method", "create", "freeze_share"]
