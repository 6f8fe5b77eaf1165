"""What has frozen stays so, whoever switches gradients on again. Freezes nothing itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter.freezable import remembered
from ..compat.torch import around_compiled, is_compiled, is_fsdp_managed, is_traced
from ..engines import release
from ..names import named_modules, named_parameters


class Hook:
    """What freezing hangs on a module. In the module's copy, and read from a file, it does nothing.

    Models are copied and pickled with their hooks, and nobody would take those back: such a hook is a function of the
    standard library that takes anything, so that a file is read where this package is not.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext, "__exit__")


class KeptFrozen:
    """PEFT lets all of an adapter train again whenever it switches adapters: set_adapter, the end of disable_adapter.

    (A reference model, as TRL's DPO takes it, is that at each step; model.requires_grad_(True) is as much in other
    loops.) What has frozen is in no param group then, so that its gradient is neither reduced nor set to zero, and
    counts where gradients are clipped. So the model looks at all of it before its forward pass, and each layer of an
    adapter and each other module at its own, a recomputed one too. Where they are compiled none does; there it is
    looked at all of it before compiled code is entered.

    The interface is that of `Freezable`, which is told of what has frozen.

    Args:
        model: The unwrapped model.
        outer: What the training loop calls, all wrappers included.
    """

    def __init__(self, model: nn.Module, outer: nn.Module) -> None:
        self._model, self._outer = model, outer
        self._all: _Hold | None = None  # of a model that is compiled somewhere
        self._held: list[tuple[Any, Callable[..., None]]] = []  # a hook's handle, what it calls

    def freezable(self) -> Collection[str]:
        return ()

    def have_frozen(self, names: Collection[str]) -> None:
        """And in trainings of before; a checkpoint of before may have let some of them train again."""
        self._look_no_more()
        modules = named_modules(self._model, remove_duplicate=False)
        parameters = named_parameters(self._model, remove_duplicate=False)
        switched = {n for n, m in modules.items() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
        below: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = defaultdict(list)
        gone = {id(parameter) for parameter in remembered(self._model)}
        for name in (name for name, parameter in parameters.items() if id(parameter) in gone):
            owner, _, own = name.rpartition(".")
            layer = owner
            while layer and layer not in switched:
                layer = layer.rpartition(".")[0]
            if not layer and isinstance(modules.get(parent := owner.rpartition(".")[0]), nn.MultiheadAttention):
                layer = parent  # which reads the weight of its out_proj, and never calls it
            below[layer or owner].append((modules[owner], own, parameters[name]))
        for layer, places in below.items():
            self._hold(modules[layer], places)
        everything = [place for places in below.values() for place in places]
        if self._all is None and any(map(is_compiled, self._outer.modules())):
            self._all = _Hold([])
            self._outer.register_forward_pre_hook(self._all, prepend=True)
            around_compiled(self._outer, self._all)
        if self._all is not None:
            self._all.places = everything
        elif everything:  # those of a module that is never called, too: an nn.ParameterList, a weight read elsewhere
            self._hold(self._model, everything, first=True)  # within a pass ZeRO-3 would gather what is looked at

    def _hold(
        self, module: nn.Module, places: list[tuple[nn.Module, str, nn.Parameter]], *, first: bool = False
    ) -> None:
        hold = _Hold(places)
        self._held.append((module.register_forward_pre_hook(hold, prepend=first), hold))

    def take_back(self) -> None:
        """Look for the last time."""
        for _, hold in self._held:
            hold()
        self._look_no_more()
        if self._all is not None:
            self._all.places = []

    def _look_no_more(self) -> None:
        while self._held:
            self._held.pop()[0].remove()


class _Hold(Hook):
    """An object: of a partial's arguments a compiler takes note, and would compile anew after each freeze."""

    def __init__(self, places: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        self.places = places

    def __call__(self, *_: Any) -> None:
        if is_traced():
            return
        for owner, name, frozen in self.places:
            if not (frozen.requires_grad or is_fsdp_managed(owner)):
                continue
            there = getattr(owner, name, None)  # None: its adapter has been deleted
            # FSDP2 puts other parameters in its place; any other is a user's (torch.func.functional_call).
            if (there is frozen or (there is not None and is_fsdp_managed(owner))) and there.requires_grad:
                release(there)
