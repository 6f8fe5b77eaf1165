"""A run's options as the words of a command line, and values of a study's file as options take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml

from ..errors import AFLoRAError
from ..training.command_line import OPTIONS


def as_its_kind(option: str, value: Any) -> Any:
    """A number as the option takes it: what names a run and what its command says are the same one."""
    kind = OPTIONS.get(option)
    if kind not in (int, float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value  # `aflora train` says what it must be
    return value if kind is int and not number.is_integer() else kind(number)


def is_true(value: Any) -> bool:
    """Whether an option that is true or false is the former, as `aflora train` reads it."""
    with suppress(yaml.YAMLError):  # what is no YAML it refuses
        return (yaml.safe_load(value) if isinstance(value, str) else value) is True
    return False


def is_whole(option: str, values: list[Any]) -> bool:
    """Whether an option takes whole numbers alone; of a name of others, as method.options.r, its values tell."""
    kind = OPTIONS.get(option)
    return all(isinstance(value, int) for value in values) if kind is None else kind in (int, int | None)


def words_of(options: Mapping[str, Any]) -> list[str]:
    """--NAME=VALUE, one after the other.

    Raises an AFLoRAError for a number, or true or false, where a text is to stand: 1.10 would become 1.1.
    """
    for name, value in options.items():
        if OPTIONS.get(name) in (str, str | None) and isinstance(value, bool | int | float):
            raise AFLoRAError(f"{name} must be text (put numbers, and true and false, into quotes), not {value}.")
    words = {n: json.dumps(v) if isinstance(v, bool | list | dict | None) else v for n, v in options.items()}
    return [f"--{name}={word}" for name, word in words.items()]
