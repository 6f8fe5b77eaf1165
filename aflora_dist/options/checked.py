"""Dataclasses of options that refuse values which their fields do not take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import AFLoRAError

# What a field's metadata may say of its numbers.
AT_LEAST_ONE = {"least": 1}
NOT_NEGATIVE = {"least": 0}
SHARE = {"least": 0, "most": 1}
DECAY = {"least": 0, "below": 1}
SEED = {"least": 0, "below": 2**32}  # NumPy's


# Itself one: a dataclass with another base is to jsonargparse a class that has to be named.
@dataclass(frozen=True, kw_only=True)
class Checked:
    """A dataclass whose values are held against its fields' types and metadata.

    Raises:
        AFLoRAError: The message names the option as a user writes it.
    """

    label: ClassVar[str] = ""  # of an option's name, in messages

    def __post_init__(self) -> None:
        check_options(self, self.label)


def check_options(options: Any, label: str) -> None:
    """Hold the values of a dataclass against its fields' types and metadata, as `Checked` and with its errors."""
    hints = get_type_hints(type(options))
    for option in fields(options):
        name = f"{label}{option.name}"
        value = _of_kind(name, getattr(options, option.name), hints[option.name])
        object.__setattr__(options, option.name, value)
        choices = _choices(hints[option.name])
        null = value is None and type(None) in get_args(hints[option.name])
        if choices and not null and value not in choices:
            raise AFLoRAError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if isinstance(value, int | float):
            _check_number(name, value, option.metadata)


def _of_kind(name: str, value: Any, hint: Any) -> Any:
    """Of options that are numbers, or yes or no, and may be null: the value as Python has it, for checkpoints."""
    kinds = {*get_args(hint)} if get_origin(hint) in (Union, UnionType) else {hint}
    if not kinds <= {int, float, bool, NoneType} or (value is None and NoneType in kinds):
        return value
    plain = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's, which is not imported for this
    if isinstance(plain, float) and float not in kinds and plain.is_integer():  # as np.ceil gives it
        plain = int(plain)
    if type(plain) in kinds or (float in kinds and type(plain) is int):
        return plain
    wanted = "true or false" if bool in kinds else "a number" if float in kinds else "a whole number"
    raise AFLoRAError(f"{name} must be {wanted}, got {value!r}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    """What a Literal lists, also one that may be null; nothing of another type."""
    return next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())


def _check_number(name: str, value: float, limits: Mapping[str, Any]) -> None:
    if not math.isfinite(value):
        raise AFLoRAError(f"{name} must be a finite number, not {value}.")
    if "least" in limits and value < limits["least"]:
        must = f"be at least {limits['least']}" if limits["least"] else "not be negative"
    elif "most" in limits and value > limits["most"]:
        must = f"be at most {limits['most']}"
    elif "below" in limits and value >= limits["below"]:
        must = f"be less than {limits['below']}"
    else:
        return
    raise AFLoRAError(f"{name} must {must}, got {value}.")


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """GROUP.KEY -> value of a configuration; what is below a key, as in method.options, stays whole.

    >>> flat({"preset": None, "train": {"epochs": 3}})
    {'preset': None, 'train.epochs': 3}
    """
    return {
        f"{group}.{key}" if isinstance(values, Mapping) else group: value
        for group, values in config.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    }
