"""What DeepSpeed saves when it is told to leave out what does not train. It loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
from torch import Tensor

from ...compat.patch import patch_method
from ...names import named_parameters


class KeptWhole:
    """Has a DeepSpeedEngine keep these parameters in what it saves with `exclude_frozen_parameters=True`.

    Trainer and TRL save so under ZeRO-3, for they take what is frozen to be the base model's. The engine owns this
    object: models are saved long after their training has ended.

    Args:
        ds: The DeepSpeedEngine.
        names: Parameters of its module.
    """

    def __init__(self, ds: Any, names: Sequence[str]) -> None:
        parameters = named_parameters(ds.module)
        self._kept = {name: parameters[name] for name in names}
        patch_method(ds, "_zero3_consolidated_16bit_state_dict", self._consolidated)
        patch_method(ds, "module_state_dict", self._module_state)
        ds.__dict__["_kept_whole"] = self

    def _frozen(self) -> dict[str, Any]:
        return {name: p for name, p in self._kept.items() if not p.requires_grad}

    def _consolidated(
        self, original: Callable[..., Any], exclude_frozen_parameters: bool = False
    ) -> dict[str, Tensor] | None:
        """ZeRO-3, a collective: on rank 0 whole tensors in CPU memory, one gathered after the other."""
        state = original(exclude_frozen_parameters)
        if exclude_frozen_parameters:
            for name, parameter in self._frozen().items():
                with deepspeed.zero.GatheredParameters([parameter]):
                    if state is not None:  # on rank 0
                        state[name] = parameter.detach().cpu().clone()
        return state

    def _module_state(
        self, original: Callable[..., Any], *args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        state = original(*args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs)
        if exclude_frozen_parameters:
            state |= {name: parameter.detach() for name, parameter in self._frozen().items()}
        return state
