"""JSON and YAML that others have written, read no deeper than a number of our own.

Python's own limit is the stack's: it depends on who calls, and libraries change it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

DEEPEST = 50  # levels; a dataset's deepest columns are Arrow's, which writes 64 at most
_PROBLEM = f"nested too deeply: more than {DEEPEST} levels"
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def loads(text: str | bytes, **options: Any) -> Any:
    """As json.loads.

    Raises:
        json.JSONDecodeError: It is not JSON, or too deep.
        UnicodeDecodeError: It is no text.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    refuse_deep_json(text)
    return json.loads(text, **options)


def refuse_deep_json(text: str, start: int = 0, end: int | None = None) -> None:
    """Raise json.JSONDecodeError, with the place, if what stands there is too deep. Nearly free where it cannot be."""
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST:
        return
    depth = 0
    for token in _TOKEN.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            raise json.JSONDecodeError(_PROBLEM, text, token.start())


def refuse_deep_yaml(text: str | bytes, loader: Any) -> None:
    """Raise yaml.MarkedYAMLError, with the place, if a document is too deep, or no YAML; `loader` is one of yaml's."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=_PROBLEM, problem_mark=event.start_mark)
