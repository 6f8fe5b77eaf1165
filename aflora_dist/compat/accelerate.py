"""accelerate 1.12 and later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils.other import has_compiled_regions, is_compiled_module

from ..errors import AFLoRAError
from .contract import is_older, private

_LISTS = "public lists of what prepare() has returned"
_accelerator = partial(private, "Accelerator", instead=_LISTS)

ACCELERATOR = [
    *_accelerator("_optimizers", "find the wrapper that knows of skipped updates"),
    *_accelerator("_models", "number the state of several models as accelerate does"),
    *_accelerator("_schedulers", "know whether DeepSpeed's schedule was asked for"),
]
PRIVATE = [
    *ACCELERATOR,
    *private("PartialState", "_shared_state", "know whether there is one, without making one", "a public query"),
]


def has_state() -> bool:
    """Whether an Accelerator, or a PartialState, has been made in this process."""
    return bool(PartialState._shared_state)


def optimizers(accelerator: Accelerator) -> Sequence[Any]:
    """The optimizers that `prepare` has returned."""
    return accelerator._optimizers


def models(accelerator: Accelerator) -> Sequence[Any]:
    """The models that `prepare` has returned."""
    return accelerator._models


def schedulers(accelerator: Accelerator) -> Sequence[Any]:
    """The schedulers that `prepare` has returned."""
    return accelerator._schedulers


def unwrap(accelerator: Accelerator, model: Any) -> Any:
    """The model without what accelerate and torch.compile have wrapped around the whole of it.

    Where only some layers are compiled, accelerate 1.12 takes the note of its own compile_regions for granted, and
    ends with KeyError without it: there the model is noted to have been compiled from itself.
    """
    if is_compiled_module(model) or "_orig_mod" in vars(model) or not has_compiled_regions(model):
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    vars(model)["_orig_mod"] = model
    try:
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    finally:
        del vars(model)["_orig_mod"]


def refuse_forgetful_load(accelerator: Accelerator) -> None:
    """Raise an AFLoRAError where accelerate 1.12 would read a sharded checkpoint of FSDP2.

    It reads all but the optimizer's state, and says nothing.
    """
    if not accelerator.is_fsdp2 or not is_older("accelerate", "1.13"):
        return
    if accelerator.state.fsdp_plugin.state_dict_type.name == "SHARDED_STATE_DICT":
        raise AFLoRAError(
            "accelerate before 1.13 does not read the optimizer's state from a sharded checkpoint of FSDP2: the "
            "training would go on as if it had just begun. accelerate 1.13 or later reads this one; with an earlier "
            "release, save with fsdp_state_dict_type: FULL_STATE_DICT, as launch/fsdp2.yaml does."
        )


def log(tracker: Any, values: dict[str, Any], step: int) -> None:
    """Tell a tracker of accelerate; accelerate 1.12 keeps the step from trackio, which then counts by itself."""
    if tracker.name == "trackio":
        tracker.tracker.log(values, step=step)
    else:
        tracker.log(values, step=step)


def store_configuration(tracker: Any, values: dict[str, Any]) -> None:
    """Tell a tracker of accelerate the run's options; accelerate 1.12 begins an offline run of wandb anew for it."""
    if tracker.name == "wandb":
        tracker.tracker.config.update(values, allow_val_change=True)
    else:
        tracker.store_init_configuration(values)
