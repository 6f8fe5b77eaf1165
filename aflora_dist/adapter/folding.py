"""Folds s_b B s_d for all layers of a model when its forward begins, and casts their A where autocast asks for it.

Only where the weights lie whole between steps. ZeRO-3 and FSDP2 hold them inside a module's own forward
alone, and a layer that is called on its own is not inside a forward that was seen to begin: there every
layer folds for itself.

A compiled model is given what is folded as inputs, where freezing is attached to it. Its graph then
never sees the parameters, so that a B, or a vector, can freeze without compiling anew; of A it is told
now and then, see `Folding._live_paths`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..compat.torch import around_compiled, forward_hooks, is_compiled, is_replica, is_traced
from .casts import compute_dtype, lies_whole
from .eq1 import Cast
from .path import AFLoRAPath, Folded, fold


class HasPaths(Protocol):
    """A layer with low-rank paths."""

    def paths_in_use(self) -> list[AFLoRAPath]:
        """Those that a forward pass now goes through."""
        ...


class Folding:
    """The hooks of one model. Layers are given what is folded for them (`AFLoRAPath.keep`)."""

    def __init__(self, layers: Iterable[HasPaths]) -> None:
        self.layers = list(layers)
        self._given: list[AFLoRAPath] = []
        self._begun: nn.Module | None = None  # by whose forward
        self._compiled = False
        self._live: set[AFLoRAPath] = set()
        self._lag = 0

    @classmethod
    def attach(cls, model: nn.Module, layers: Iterable[HasPaths]) -> None:
        """Fold these layers from now on whenever the model's forward begins."""
        cls.detach(model)
        cls(layers)._hook(model)

    def _hook(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    @classmethod
    def of(cls, model: nn.Module) -> Folding | None:
        """What folds for this module, if it was given to `attach`."""
        owners = (getattr(hook, "__self__", None) for hook in forward_hooks(model)[0].values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    @classmethod
    def detach(cls, model: nn.Module) -> Folding | None:
        """Take the hooks away again, and return whose they were."""
        found = None
        for hooks in forward_hooks(model):
            for key, hook in list(hooks.items()):
                if isinstance(owner := getattr(hook, "__self__", None), cls):
                    found = owner
                    del hooks[key]
        return found

    @classmethod
    def compiled(cls, outer: nn.Module, model: nn.Module) -> None:
        """Fold before compiled code is entered, if any part of it is compiled.

        Args:
            outer: What the training loop calls, all wrappers included.
            model: What `attach` was given.
        """
        if not any(map(is_compiled, outer.modules())):
            return
        folding = cls.detach(model)
        assert folding is not None, "freezing has found layers"
        folding._compiled = True
        cls.detach(outer)
        folding._hook(model)
        if outer is not model:
            folding._hook(outer)
        around_compiled(outer, partial(folding.begin, outer, ()), partial(folding.end, outer, (), None))

    def begin(self, module: nn.Module, args: Any) -> None:
        if is_traced() or is_replica(module):  # DataParallel's replicas have parameters of their own
            return
        if module is self._begun:  # a forward that Ctrl-C ended, after which torch calls no hook
            self.end(module, args, None)
        if self._given:  # it has begun further outside
            return
        self._begun = module
        groups: dict[Any, list[AFLoRAPath]] = defaultdict(list)
        for path in (path for layer in self.layers for path in layer.paths_in_use()):
            if lies_whole(path):
                B = path.B
                # What has frozen whole must not hang on the graph of what trains: nothing below runs backward then.
                trains = B.requires_grad or path.s_d.requires_grad or path.s_b.requires_grad
                groups[B.device, B.shape[1], B.dtype, trains].append(path)
        live = self._live_paths(groups.values())
        for (device, _, default, _), paths in groups.items():
            self._fold(paths, compute_dtype(device.type, default), live)

    def _live_paths(self, groups: Iterable[list[AFLoRAPath]]) -> set[AFLoRAPath]:
        """Whose A a compiled graph takes for one that trains.

        A graph is compiled with or without an A's gradient. So that it is not compiled anew whenever one freezes,
        a fifth of them may freeze before it is told; until then their gradients are computed, and end in `Cast`.
        """
        training = {path for paths in groups for path in paths if path.A.requires_grad}
        if not self._compiled:
            return training
        self._lag = self._lag or math.ceil(len(training) / 5)
        if not training or not training <= self._live or len(self._live) - len(training) >= self._lag:
            self._live = training
        return self._live

    def _fold(self, paths: list[AFLoRAPath], dtype: torch.dtype, live: set[AFLoRAPath]) -> None:
        paths.sort(key=lambda path: path.B.shape[0])
        # Where engines hook parameters they are to see only those of layers that were called, each when its gradient is
        # there. A compiled graph is one node in any case.
        apart = dist.is_available() and dist.is_initialized() and not self._compiled
        through = [p for p in paths if p in live and (self._compiled or (p.A.dtype != dtype and not apart))]
        cast = dict(zip(through, Cast.apply(dtype, *(path.A for path in through)), strict=True)) if through else {}
        with_graph = torch.is_grad_enabled()
        for path, up in zip(paths, fold(paths, dtype, apart=apart), strict=True):
            A = cast[path] if path in cast else path.cast_A(dtype)
            A = A.detach() if self._compiled and path not in cast else A
            path.keep(Folded(A, up, with_graph, path.versions() if with_graph else ()))
        self._given += paths

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_traced():
            for path in self._given:
                path.keep(None)
            self._given = []
            self._begun = None
