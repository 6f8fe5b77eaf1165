"""Makes PEFT know AFLoRA as soon as PEFT is there, without importing PEFT, or torch, for that alone.

`import aflora_dist` promises that `PeftModel.from_pretrained` and the like know the method. Both take seconds
to import, which a process that shows a run or prints a help text is spared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from types import ModuleType
from typing import Any


def register_with_peft() -> None:
    """Register now if peft is imported, and else right after its import, whoever does it. Idempotent."""
    if sys.modules.get("peft") is None and not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
    peft = sys.modules.get("peft")  # again: a thread may have begun to import it before the finder was there
    if peft is None:
        return
    if _is_half_imported(peft):
        assert peft.__spec__ is not None
        peft.__spec__.__class__ = _HalfImported
    if not _is_half_imported(peft):  # again: it may have become whole in the meantime
        _register()


def _register() -> None:
    """For a whole peft. The adapter's package may be half imported: it waits for peft before it does anything."""
    from .adapter.model import register

    register()


class _PeftFinder(MetaPathFinder):
    """Finds peft as the finders after this one do. Stays until peft is imported: others only ask where it is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in list(dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    """peft's own loader, which is all that peft will see; registers when it has done its work."""

    def __init__(self, loader: Loader, finder: _PeftFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:  # what else a loader may offer, such as get_source
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)


class _HalfImported(ModuleSpec):
    """The spec of a peft whose import was under way already: it learns from importlib when that has ended."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]  # its base
            register_with_peft()  # an import that failed has left no peft behind; the next one is waited for


def _is_half_imported(module: ModuleType) -> bool:
    """What importlib itself goes by, so that two threads do not import the same module."""
    return getattr(module.__spec__, "_initializing", False)
