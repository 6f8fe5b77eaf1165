"""accelerate 1.12 and later."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils.other import has_compiled_regions, is_compiled_module


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
