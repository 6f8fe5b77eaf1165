"""accelerate's own checkpoints hold freezing, too: accelerator.save_state and load_state, on every engine."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..compat.accelerate import models, refuse_forgetful_load, unwrap
from ..compat.patch import patch_method
from ..errors import AFLoRAError, writing
from ..processes import on_main
from ..untrusted import reading

if TYPE_CHECKING:
    from .adaptive import AdaptiveFreezing

_FILE = "aflora_freezing{}.pt"
# Of each accelerator, the files of those that are attached; none keeps the other alive.
_TAKEN: weakref.WeakKeyDictionary[Accelerator, weakref.WeakValueDictionary[str, AccelerateState]]
_TAKEN = weakref.WeakKeyDictionary()


class AccelerateState:
    """Writes the freezing beside what accelerate saves, and brings it back around what accelerate loads.

    accelerate's own hooks come too late for DeepSpeed and FSDP: a frozen matrix must have left the optimizer before
    its state is loaded. The accelerator outlives models, so it does not keep the freezing alive.
    """

    def __init__(self, accelerator: Accelerator, freezing: AdaptiveFreezing) -> None:
        self._accelerator = accelerator
        self._freezing = weakref.ref(freezing)
        unwrapped = [unwrap(accelerator, model) for model in models(accelerator)]
        taken = _TAKEN.setdefault(accelerator, weakref.WeakValueDictionary())
        # As accelerate numbers models. A part of one, frozen by itself, takes the next number that is free.
        number = next((i for i, model in enumerate(unwrapped) if model is freezing.engine.model), None)
        del unwrapped
        numbers = count() if number is None else [number]
        self._file = next(f for n in numbers if (f := _FILE.format(f"_{n}" if n else "")) not in taken or n == number)
        taken[self._file] = self
        self._handles = [
            patch_method(accelerator, "save_state", self._save_state),
            patch_method(accelerator, "load_state", self._load_state),
            patch_method(accelerator, "end_training", self._end_training),
            patch_method(accelerator, "free_memory", self._free_memory),
        ]

    def close(self) -> None:
        while self._handles:
            self._handles.pop()()
        taken = _TAKEN.get(self._accelerator)
        if taken is not None and taken.get(self._file) is self:
            del taken[self._file]

    def _save_state(
        self, original: Callable[..., Any], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if (freezing := self._freezing()) is None:
            return original(output_dir, *args, **kwargs)
        freezing.progress.check_finite()

        def remove() -> None:
            path = Path(str(output_dir)) / self._file
            with writing("The freezing's state", path):
                path.unlink(missing_ok=True)

        # Where one is written over: who is killed meanwhile must not leave its new weights beside the old clock.
        if not self._accelerator.project_configuration.automatic_checkpoint_naming:
            on_main(self._accelerator, remove)
        folder = original(output_dir, *args, **kwargs)
        state = freezing.state_dict()

        def write() -> None:
            path = Path(folder) / self._file
            with writing("The freezing's state", path):
                with path.with_suffix(".tmp").open("wb") as file:  # an open file reports a full disk as OSError
                    torch.save(state, file)
                path.with_suffix(".tmp").replace(path)

        on_main(self._accelerator, write)
        return folder

    def _load_state(self, original: Callable[..., Any], input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if (freezing := self._freezing()) is None:
            return original(input_dir, *args, **kwargs)
        refuse_forgetful_load(self._accelerator)
        state: dict[str, Any] = {"tensors": {}}

        def read() -> dict[str, Any]:
            path = self._folder(input_dir) / self._file
            if not path.parent.is_dir():
                raise AFLoRAError(f"There is no folder {path.parent}, which accelerator.load_state() was told to load.")
            if not path.exists():
                raise AFLoRAError(
                    f"{path.parent} holds no state of freezing ({self._file}): it was saved without AdaptiveFreezing, "
                    f"or its saving was cut short. Create it before accelerator.save_state(), take another "
                    f"checkpoint, or load this before creating it."
                )
            with reading(path, "Take another checkpoint."):
                state.update(torch.load(path, map_location="cpu", weights_only=True))
                return state["record"]

        state["record"] = on_main(self._accelerator, read)
        freezing.state.select(state["record"])
        result = original(input_dir, *args, **kwargs)
        freezing.engine.reload()
        freezing.load_state_dict(state)
        return result

    def _folder(self, input_dir: str | None) -> Path:
        if input_dir is not None:
            return Path(input_dir).expanduser()
        # As accelerate chooses it: the highest number.
        configuration = self._accelerator.project_configuration
        folders = [p for p in (Path(configuration.project_dir or ".") / "checkpoints").glob("*") if p.is_dir()]
        numbered = [(int(found[0]), p) for p in folders if (found := re.findall(r"(\d+)$", p.name))]
        if not configuration.automatic_checkpoint_naming or not numbered:
            raise AFLoRAError("accelerator.load_state() needs the folder to load from.")
        return max(numbered)[1]

    def _end_training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (freezing := self._freezing()) is not None:
            freezing.ended()
        return original(*args, **kwargs)

    def _free_memory(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (freezing := self._freezing()) is not None:
            freezing.release()  # DeepSpeed keeps a ZeRO-3 model alive, and with it whoever watches it
            del freezing
        return original(*args, **kwargs)
