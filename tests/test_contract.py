"""Private interfaces of other libraries: listed in one place each, looked for in time, rehearsed before training."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from aflora_dist import AFLoRAError
from aflora_dist.adapter import private as peft_private
from aflora_dist.adapter.model import register
from aflora_dist.compat import contract
from aflora_dist.compat.contract import LISTS, SEEN, Private, require
from aflora_dist.engines import private
from aflora_dist.engines.deepspeed import private as deepspeed_private
from aflora_dist.engines.native import ReplicatedEngine
from tests.launch import ROOT
from tests.loop import Loop

GONE = Private("Somebody", "_moved_elsewhere", "do something", "nothing yet")


@pytest.mark.parametrize(
    ("library", "entries", "attach"),
    [
        ("accelerate", private.ACCELERATOR, Loop),
        ("torch", private.AUTOGRAD, Loop),
        ("peft", peft_private.TUNER, register),
    ],
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
    with pytest.raises(AFLoRAError, match=r"failed when it was rehearsed.*missing 1 required.*torch 2"):
        Loop()


def test_a_restored_state_that_is_not_the_same_is_found_in_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(self: Any, tensors: Any, record: Any) -> None:
        for name in record["names"]:
            self.parameters[name].data.add_(1)

    monkeypatch.setattr(ReplicatedEngine, "load", forgets)
    with pytest.raises(AFLoRAError, match="its state is not the same afterwards"):
        Loop()


def test_deepspeed_s_private_interfaces_are_named_in_one_folder_only() -> None:
    """DeepSpeed's own words; a few are everyday words, too, and are looked for with their underscore or prefix."""
    words = {entry.name for entry in deepspeed_private.PRIVATE["deepspeed"]}
    words -= {"optimizer", "overflow", "_config", "step"}
    pattern = re.compile(
        r"\b(" + "|".join(re.escape(word) for word in sorted(words)) + r"|ds_(?!configs)\w+|_hp_mapping)\b"
    )
    elsewhere = {}
    for path in (ROOT / "aflora_dist").rglob("*.py"):
        if "deepspeed" not in path.parts and (found := set(pattern.findall(path.read_text()))):
            elsewhere[path.name] = found
    # A parameter that from_pretrained has sharded is known by these, before there is any engine.
    assert elsewhere == {"private.py": {"ds_id", "ds_shape"}}


def test_the_page_lists_what_the_code_lists() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        contract.main()
    assert printed.getvalue() in (ROOT / "docs" / "engines.md").read_text()
    for module in LISTS:
        for library, entries in import_module(module).PRIVATE.items():
            assert library in SEEN
            assert all(entry.why and entry.instead for entry in entries)


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
    assert {name: pinned()[name] for name in SEEN} == SEEN


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
    require("torch", object(), [newest])
    with pytest.raises(AFLoRAError, match=r"has no Somebody\._came_later"):
        require("torch", object(), [replace(newest, since="2.0")])
