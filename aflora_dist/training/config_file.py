"""A YAML file of `aflora train`'s options: looked through in one place, and refused with its line.

What is in it is left to jsonargparse, which takes the last of a key that stands twice, passes over a key without a
value, and tells of neither; nor in which file and line a mistake is. Values of the command line are YAML as well.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import AFLoRAError
from ..untrusted import refuse_deep_yaml


class Entry(NamedTuple):
    """An option in a file: where, for messages, as in "mine.yaml, line 3"; what is written there; and if it is null."""

    place: str
    value: str
    null: bool = False


Entries = dict[str, Entry]
_OF_DATA = (".csv", ".tsv", ".jsonl", ".parquet")  # .json may hold options, as YAML does
_NULL, _INT, _FLOAT, _TEXT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "int", "float", "str", "merge"))


def look_through(path: str, groups: Container[str], options: dict[str, bool]) -> Entries:
    """The options of a file.

    Args:
        groups: Names under which options stand.
        options: Whether each may be null.

    Raises:
        AFLoRAError: It cannot be read, is no YAML, or holds a key that there is not, or one twice, or nothing.
    """
    document = _document(path)
    if document is None:
        raise AFLoRAError(f"{path} sets no option: it is empty, or all in it is commented out.")
    if not isinstance(document, yaml.MappingNode):
        raise AFLoRAError(f"{path} must hold options by group, as in `train:` and below it `  epochs: 3`.")
    entries: Entries = {}
    for name, value in _leaves(document, path, entries, groups):
        place = entries[name].place
        if name not in options:
            close = get_close_matches(name, [*options], n=1, cutoff=0.75)
            hint = f" Did you mean {close[0]}?" if close else " `aflora train --help` lists all."
            raise AFLoRAError(f"{place}: there is no option {name}.{hint}")
        if value.tag == _NULL and not options[name]:
            raise AFLoRAError(f"{place}: {name} has no value. Give one, or remove the line.")
        try:
            refuse_misread(value, name)
        except yaml.MarkedYAMLError as error:
            line = value.start_mark.line if error.problem_mark is None else error.problem_mark.line
            raise AFLoRAError(f"{path}, line {line + 1}: {error.problem}.") from None
    return entries


def refuse_misread(node: yaml.Node | None, name: str = "", seen: set[int] | None = None) -> None:
    """Raise yaml.MarkedYAMLError, with the place, where YAML reads below `name` what is hardly meant.

    These are numbers that are not decimal to it, keys that are no text, and of a key that stands twice the last.
    """
    seen = set() if seen is None else seen
    if node is None or id(node) in seen:  # by an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        sixties = node.tag in (_INT, _FLOAT) and ":" in node.value
        if sixties or (node.tag == _INT and re.match(r"[+-]?0.", node.value)):
            raise _misread(f"{name}: to YAML, {node.value} is no decimal number", node)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            refuse_misread(item, name, seen)
    else:
        names = set()
        for key, value in node.value:
            inner = f"{name}.{key.value}".removeprefix(".")
            if key.tag not in (_TEXT, _MERGE):
                raise _misread(f"{name}: to YAML, {key.value} is no text. Put it into quotes", key)
            if key.value in names:
                raise _misread(f"{inner} stands there already: keep one", key)
            names.add(key.value)
            refuse_misread(value, inner, seen)


def _misread(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what jsonargparse, and YAML 1.2, would read as a number: a commit of the name 12e4567."""


_Dumper.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def as_yaml(options: Any) -> str:
    """A configuration as a file of options, to the same values when it is read again."""
    text: str = yaml.dump(options, Dumper=_Dumper, allow_unicode=True, default_flow_style=False, sort_keys=False)
    return text


def _document(path: str) -> yaml.Node | None:
    if Path(path).suffix.lower() in _OF_DATA:  # `aflora data` takes it so
        raise AFLoRAError(
            f"{path} is a file of data, and what stands here is one of options: --data.train_file {path}, with "
            f"--data.task files for labels or sft for a language model."
        )
    if Path(path).is_fifo():  # it would be waited for, and is read twice
        raise AFLoRAError(f"{path}, which is to hold the options, is a pipe. Name a file.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        refuse_deep_yaml(text, yaml.SafeLoader)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise AFLoRAError(f"There is no file {path}, which is to hold the options. Options begin with `--`.") from None
    except UnicodeDecodeError as error:
        raise AFLoRAError(f"{path} is not text in UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise AFLoRAError(f"{path}, which is to hold the options, could not be read: {error.strerror}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise AFLoRAError(f"{path}{where} is not YAML: {problem}.") from None
    except yaml.YAMLError as error:  # characters that cannot be
        raise AFLoRAError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}.") from None


def _leaves(
    node: yaml.MappingNode, path: str, entries: Entries, groups: Container[str], prefix: str = ""
) -> Iterator[tuple[str, yaml.Node]]:
    """Options with their values; notes each."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        place = f"{path}, line {key.start_mark.line + 1}"
        if name in entries:
            raise AFLoRAError(
                f"{place}: {name} stands there already ({entries[name].place.rsplit(', ')[-1]}): keep one."
            )
        null = value.tag == _NULL
        said = "null" if null else value.value if isinstance(value, yaml.ScalarNode) else "this"
        entries[name] = Entry(place, said, null)
        if name in groups:
            if not isinstance(value, yaml.MappingNode):
                raise AFLoRAError(f"{place}: {name} must hold options, indented in the lines below it; or remove it.")
            yield from _leaves(value, path, entries, groups, f"{name}.")
        else:
            yield name, value
