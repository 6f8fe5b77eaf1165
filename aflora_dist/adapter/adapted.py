"""The AFLoRA layers of a model for who freezes them, in whatever way they came into it. Changes nothing of Eq. 1."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ..names import AdapterTensor, named_modules
from .folding import Folding
from .layer import AFLoRALayer
from .path import AFLoRAPath


class Adapted:
    """What `AdaptiveFreezing` is told by a model with AFLoRA adapters, and what it tells them.

    `get_peft_model` leaves a tuner in the model; `inject_adapter_in_model` and transformers' `add_adapter` leave the
    layers alone.

    Attributes:
        layers: By their names in the model, unwrapped; none if it has no AFLoRA adapter.
        roots: The modules that were adapted, usually one: `Folding` is attached to them.
        own: Names of all parameters of the low-rank paths. A matrix that never trains was drawn at random: it belongs
            to what is saved, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: m for name, m in named_modules(model).items() if isinstance(m, AFLoRALayer)}
        # A compiled model is folded for further outside, too: what was adapted is the innermost.
        self.roots = list({folding: m for m in model.modules() if (folding := Folding.of(m)) is not None}.values())
        self._guards = {layer.guard for layer in self.layers.values()}
        self._paths = {name: m for name, m in named_modules(model).items() if isinstance(m, AFLoRAPath)}
        self._may_freeze = set(self.freezable())
        self.own = [f"{path}.{own}" for path, m in self._paths.items() for own, _ in m.named_parameters()]

    def freezable(self) -> list[str]:
        """Names of the projection matrices that may freeze, as `freezable_matrices`."""
        return list(self.freezable_matrices())

    def frozen(self) -> set[str]:
        """Names of the projection matrices that have frozen by score."""
        return {f"{name}.{matrix}" for name, path in self._paths.items() if path.adaptive for matrix in path.frozen}

    def have_frozen(self, names: Collection[str]) -> None:
        """These must not train, whatever PEFT switches on; what may freeze besides trains (again)."""
        self._may_freeze |= set(names)
        for name in self._may_freeze:
            path, _, matrix = name.rpartition(".")
            if path in self._paths:
                frozen = self._paths[path].frozen
                (frozen.add if name in names else frozen.discard)(matrix)

    def attach(self, outer: nn.Module, by: object) -> None:
        """`by`, an `AdaptiveFreezing`, watches this model from now on; `outer` is what the training loop calls."""
        for guard in self._guards:
            guard.watch_for(by)
            guard.waived = False
        for root in self.roots:
            Folding.compiled(outer, root)

    def detach(self, *, waived: bool) -> None:
        """It does not any more; `waived`: the rest of the matrices may train to the end without one."""
        for guard in self._guards:
            guard.watch_for(None)
            guard.waived = waived or guard.waived

    @property
    def freezing_attached(self) -> bool:
        """Whether an `AdaptiveFreezing` watches this model. While none does, a second training step is refused."""
        return any(guard.attached for guard in self._guards)

    def freezable_matrices(self) -> dict[str, nn.Parameter]:
        """The projection matrices of the active adapters that train and are yet to freeze, by name."""
        return {
            str(AdapterTensor(module, adapter, matrix)): path.get_parameter(matrix)
            for module, adapter, path in self._active_paths()
            for matrix in path.to_freeze()
        }

    def _active_paths(self) -> Iterator[tuple[str, str, AFLoRAPath]]:
        for name, layer in self.layers.items():
            for adapter in layer.active_adapters:
                if adapter in layer.aflora:
                    yield name, adapter, layer.path(adapter)
