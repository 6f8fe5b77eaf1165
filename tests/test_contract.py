"""Private interfaces of other libraries: listed in one place each, looked for in time, rehearsed before training."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import sys
import textwrap
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
from packaging.version import Version

import aflora_dist
from aflora_dist import AFLoRAError
from aflora_dist.adapter.model import register
from aflora_dist.compat import contract
from aflora_dist.compat.accelerate import ACCELERATOR
from aflora_dist.compat.contract import SEEN, Private, lists, require_private
from aflora_dist.compat.peft import TUNER
from aflora_dist.compat.torch import AUTOGRAD
from aflora_dist.engines.ddp import ReplicatedEngine
from tests.launch import ROOT
from tests.loop import Loop

GONE = Private("Somebody", "_moved_elsewhere", "do something", "nothing yet")


@pytest.mark.parametrize(
    ("library", "entries", "attach"),
    [("accelerate", ACCELERATOR, Loop), ("torch", AUTOGRAD, Loop), ("peft", TUNER, register)],
)
def test_an_interface_that_is_gone_is_an_error_that_names_the_release(
    library: str, entries: list[Private], attach: Callable[[], Any]
) -> None:
    entries.append(GONE)
    try:
        with pytest.raises(AFLoRAError, match=rf"has no Somebody\._moved_elsewhere.*{library} {SEEN[library]}"):
            attach()
    finally:
        entries.remove(GONE)


def test_an_interface_that_does_something_else_breaks_in_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Any, names: Sequence[str]) -> list[Any]:
        raise TypeError("_ddp_init_helper() missing 1 required positional argument: 'speed'")

    monkeypatch.setattr(ReplicatedEngine, "select", breaks)
    with pytest.raises(AFLoRAError, match=r"failed when it was rehearsed.*missing 1 required.*torch 2.*something else"):
        Loop()


def test_a_restored_state_that_is_not_the_same_is_found_in_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(self: Any, tensors: Any, record: Any) -> None:
        for name in record["names"]:
            self.parameters[name].data.add_(1)

    monkeypatch.setattr(ReplicatedEngine, "load", forgets)
    with pytest.raises(AFLoRAError, match="its state is not the same afterwards"):
        Loop()


PACKAGE = ROOT / "aflora_dist"


@cache
def trees() -> dict[Path, ast.Module]:
    """The package's modules, by their paths in it."""
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def own_names(tree: ast.AST) -> set[str]:
    """What code defines: functions, classes, variables, attributes of its own objects."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return found


def private_names(tree: ast.AST) -> set[str]:
    """Private names that code reads, imports, or asks for by a string; and ZeRO's own attributes of parameters."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {part for name in node.names for part in (*(node.module or "").split("."), name.name)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            found |= {str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant)}
    named_tuples = {"_replace", "_asdict"}
    return {name for name in found - named_tuples if re.fullmatch(r"_[^_]\w*|ds_\w+", name)}


def listed(*libraries: str, everywhere: bool = True) -> set[str]:
    chosen = [e for name, entries in lists().items() for e in entries if not libraries or name in libraries]
    return {e.name for e in chosen if everywhere or e.anywhere}


def test_private_interfaces_are_used_in_compat_alone_or_where_its_lists_say_so() -> None:
    """Engines for DeepSpeed read its objects themselves: see the next test."""
    own: dict[str, set[str]] = defaultdict(set)  # a room is private to others, not to itself
    for path, tree in trees().items():
        own[path.parts[0]] |= own_names(tree)
    unlisted = {}
    for path, tree in trees().items():
        allowed = own[path.parts[0]] | listed(everywhere=path.parts[0] == "compat")
        if path.is_relative_to("engines/deepspeed"):
            allowed |= listed("deepspeed")
        allowed |= {part for entries in lists().values() for e in entries for part in e.owner.split(".")}
        if found := private_names(tree) - allowed:
            unlisted[str(path)] = found
    assert not unlisted


def test_what_is_read_of_deepspeed_s_objects_is_listed() -> None:
    public = {"step", "backward", "module", "optimizer", "param_groups", "zero_optimization_stage"} | {
        "__dict__",
        "__class__",
    }
    objects = {"self.zero", "zero", "self.ds", "ds", "old"}
    for path, tree in trees().items():
        if path.is_relative_to("engines/deepspeed"):
            read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in objects}
            assert read <= listed("deepspeed") | public | {"__dict__", "__class__"}, path


def test_what_ours_replace_of_others_classes_is_listed() -> None:
    """Private methods, and attributes that a class of ours sets on itself and a base of another library has."""
    unlisted = {}
    modules = [m.name for m in walk_packages(aflora_dist.__path__, "aflora_dist.")]
    for module in map(import_module, modules):
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                others = [base for base in kind.__mro__[1:] if not base.__module__.startswith("aflora_dist")]
                body = ast.parse(textwrap.dedent(inspect.getsource(kind)))
                private = {name for name in own_names(body) if re.fullmatch(r"_[^_]\w*", name)}
                if found := {name for name in private if any(hasattr(base, name) for base in others)} - listed():
                    unlisted[f"{module.__name__}.{kind.__name__}"] = found
    assert not unlisted


def test_what_is_listed_is_used() -> None:
    words = Counter(word for path in PACKAGE.rglob("*.py") for word in re.findall(r"\w+", path.read_text()))
    assert [name for name in listed() if words[name] < 2] == []


def test_the_page_lists_what_the_code_lists() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        contract.main()
    assert printed.getvalue() == (ROOT / "docs" / "private.md").read_text()
    assert all(entry.why and entry.instead for entries in lists().values() for entry in entries)


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and line[0] != "#")


def bounds() -> dict[str, str]:
    """The lower bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    found = (re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", entry) for entry in declared)
    return dict(each.groups() for each in found if each)


def test_the_versions_that_the_contract_names_are_those_that_are_pinned() -> None:
    libraries = {name: release for name, release in SEEN.items() if name != "python"}
    assert {name: pinned()[name] for name in libraries} == libraries


def test_the_environments_that_make_makes_have_the_versions_that_they_are_for() -> None:
    """No pin and no bound names a release that was not tried."""
    meant = {".venv": pinned, ".venv-oldest": bounds}.get(Path(sys.prefix).name, dict)()
    # In the path's order: setuptools appends a folder of its own, with other releases of a few libraries.
    installed: dict[str, str] = {}
    for d in distributions():
        installed.setdefault(d.name.lower().replace("_", "-"), Version(d.version).public)
    other = {
        name: (wanted, here)
        for name, wanted in meant.items()
        if (here := installed.get(name.lower().replace("_", "-"))) and Version(here) != Version(wanted)
    }
    assert not other, f"name: (meant, installed); after a change of versions make the environment anew: {other}"


def test_an_interface_that_came_later_is_asked_only_of_releases_since() -> None:
    newest = Private("Somebody", "_came_later", "do something", "nothing yet", since="9999.0")
    require_private("torch", object(), [newest])
    with pytest.raises(AFLoRAError, match=r"has no Somebody\._came_later"):
        require_private("torch", object(), [replace(newest, since="2.0")])
