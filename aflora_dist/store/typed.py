"""Values of JSON or YAML that others have written, as of the type that they should have; else None, or empty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from .. import untrusted

_LARGEST = 1e150  # its square is a number, too

T = TypeVar("T")


def finite(record: Any) -> Any:
    """A number that is not finite, which JSON does not have, as None."""
    if isinstance(record, float):
        return record if math.isfinite(record) else None
    if isinstance(record, Mapping):
        return {key: finite(value) for key, value in record.items()}
    return [finite(value) for value in record] if isinstance(record, list | tuple) else record


def as_json(value: Any, left: list[int], depth: int = 0) -> Any:
    """Of YAML what JSON has, everything else as text. `left`: how many values it may still hold, aliases included.

    Raises:
        ValueError: It holds more, or is nested too deeply.
    """
    left[0] -= 1
    if left[0] < 0 or depth > untrusted.DEEPEST:
        raise ValueError
    if isinstance(value, dict):
        return {str(key): as_json(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_json(item, left, depth + 1) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # 2.0 epochs are 2
    if value is None or isinstance(value, bool) or number(value) is not None:
        return value
    return hex(value) if isinstance(value, int) else text(str(value))


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return value


def integer(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and abs(found) < 2**53 and found == int(found) else None


def text(value: Any) -> str | None:
    """A text in one line that every terminal shows."""
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else None


def texts(value: Any) -> list[str]:
    return [found for item in value if (found := text(item)) is not None] if isinstance(value, list) else []


def numbers(value: Any) -> dict[str, float | None]:
    return {text(key) or "?": number(item) for key, item in value.items()} if isinstance(value, dict) else {}


_AS: dict[str, Callable[[Any], Any]] = {  # by a field's annotation: the value if it is of that type, else None or empty
    "int": integer,
    "int | None": integer,
    "float | None": number,
    "str": lambda value: text(value) or "?",
    "str | None": text,
    "list[str]": texts,
    "dict[str, float]": lambda value: {name: n for name, n in numbers(value).items() if n is not None},
    "dict[str, float | None]": numbers,
    "list[dict[str, float | None]]": lambda value: [
        numbers(one) for one in (value if isinstance(value, list) else []) if isinstance(one, dict)
    ],
}


def typed(kind: type[T], record: Mapping[str, Any]) -> T:
    """What a record holds of a dataclass's fields, and nothing that is of another type."""
    known: Any = fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: _AS[field.type](record.get(field.name)) for field in known})
