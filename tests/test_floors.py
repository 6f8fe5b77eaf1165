"""The package's rooms know nothing of what stands above them, and no file, function or name outgrows the reader."""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from aflora_dist.options import ModelConfig
from aflora_dist.tasks.model import _source
from profiling import house
from profiling.house import FLOORS, Import, arrows, circles, imports, modules, room

FILE, FUNCTION = 350, 60  # lines, blank ones and docstrings included

# Arrows that run upward, and why. They are held to be needed: one that nothing draws any more has to go from here.
UPWARD: dict[tuple[str, str], str] = {}
# The package's own face hands out names of all floors. What else may it import but what stands lowest?
ENTRY = {
    ("_registration", "adapter.model"): "`import aflora_dist` promises that PEFT knows the method, once PEFT is there"
}
# What is larger, and why it may be.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS = {"training/loop.py: train"}  # a list of steps, and the whole of the story
# Public names that several modules define, and why.
SAME_NAMES = {"main": "what a command or `python -m` starts, by custom"}


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in modules()} - {*house.ENTRY}
    assert rooms == {*FLOORS}, "a new room needs a floor in profiling/house.py, and one that is gone needs none"
    assert {*FLOORS.values()} == {*house.SAID}


def test_no_import_runs_upward() -> None:
    upward = [
        taken for (source, target), all_of in arrows().items() if FLOORS[target] > FLOORS[source] for taken in all_of
    ]
    assert [str(taken) for taken in upward if (taken.source, taken.target) not in UPWARD] == []
    assert {(taken.source, taken.target) for taken in upward} == {*UPWARD}, "an arrow that is allowed is drawn no more"


def test_rooms_go_round_in_no_circle() -> None:
    allowed = {(room(source), room(target)) for source, target in UPWARD}
    assert circles({*arrows()} - allowed) == []


def test_what_importing_the_package_imports_stands_lowest() -> None:
    """At the top of a module: names of all floors are handed out when they are asked for."""
    found = {
        (taken.source, taken.target) for module in house.ENTRY for taken in imports(module) if taken.target != module
    }
    higher = {pair for pair in found if FLOORS.get(room(pair[1]), 1) > 1 and pair[0]}
    assert higher == {*ENTRY}
    tree = ast.parse(modules()[""].read_text(encoding="utf-8"))
    at_once = ast.Module([node for node in tree.body if not isinstance(node, ast.If)], [])
    asked = {taken.target for taken in imports("", ast.unparse(at_once))}
    assert {target for target in asked if FLOORS.get(room(target), 1) > 1} == set()


def test_nobody_asks_the_package_s_face_for_what_a_room_has() -> None:
    """It would be an arrow that no floor shows."""
    asked = [taken for module in modules() if module not in house.ENTRY for taken in imports(module)]
    assert [str(taken) for taken in asked if taken.target == "" and taken.name != "__version__"] == []


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("engines.base", "from ..control import Any", "control"),
        ("engines.base", "def f():\n    from ..control.adaptive import Any", "control.adaptive"),
        ("engines.base", "if TYPE_CHECKING:\n    from ..training import run", "training.run"),
        ("engines.base", "import aflora_dist.control.adaptive", "control.adaptive"),
        ("engines.base", "from aflora_dist.control import adaptive", "control.adaptive"),
        ("engines", "from .base import Engine", "engines.base"),
        ("engines", "from ..errors import AFLoRAError", "errors"),
        ("cli", "from . import errors", "errors"),
        ("cli", "from . import __version__", ""),
        ("cli", "start = import_module('.' + {'plan it': 'plan.command'}[name], __package__)", "plan.command"),
    ],
)
def test_imports_are_seen_wherever_they_stand(module: str, source: str, target: str) -> None:
    assert [taken.target for taken in imports(module, source)] == [target]
    assert [taken.source for taken in imports(module, source)] == [module]


def test_circles_are_seen() -> None:
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")}) == [["a", "b", "c"]]
    assert circles({("a", "b"), ("b", "c"), ("a", "c")}) == []


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(file.relative_to(house.PACKAGE)): ast.parse(file.read_text(encoding="utf-8")) for file in modules().values()
    }


def test_no_file_is_long() -> None:
    long = {
        str(file.relative_to(house.PACKAGE))
        for file in modules().values()
        if len(file.read_text(encoding="utf-8").splitlines()) > FILE
    }
    assert long == LONG_FILES


def test_no_function_is_long() -> None:
    long = {
        f"{file}: {node.name}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION
    }
    assert long == LONG_FUNCTIONS


def test_no_two_modules_define_the_same_public_name() -> None:
    """A class or function at a module's top; a reader who looks for it finds one."""
    where = defaultdict(set)
    for file, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].add(file)
    assert {name for name, files in where.items() if len(files) > 1} == {*SAME_NAMES}


def test_whoever_has_transformers_load_something_says_whether_code_may_run() -> None:
    """None means that the terminal is asked. `hub` is what tasks/model.py says with every model."""
    asked = {
        f"{file}: {ast.unparse(node.func)}": {ast.unparse(word) for word in node.keywords}
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.func.value) not in ("PeftModel", "PeftConfig")
    }
    assert len(asked) > 5
    silent = {call for call, words in asked.items() if not any(w.startswith("trust_remote_code=") for w in words)}
    assert {call for call in silent if "**hub" not in asked[call]} == set()
    for trust in (False, True):
        _, hub, _ = _source(ModelConfig(trust_remote_code=trust), False)
        assert hub["trust_remote_code"] is trust


def test_the_house_is_drawn_from_the_imports(tmp_path: Path) -> None:
    assert house.main(["--out", str(tmp_path / "house.svg")]) == 0
    drawn = (tmp_path / "house.svg").read_text(encoding="utf-8")
    assert drawn == house.draw()
    for name in FLOORS:
        assert f">{name}" in drawn
        assert f"{house.lines(name):,} lines" in drawn
    for source, target in arrows():
        assert f"<title>{source} uses {target}: " in drawn


def test_an_arrow_says_where_it_comes_from() -> None:
    assert str(Import("store.resume", "watch.log", "Log", 7)) == "store.resume, line 7: imports Log of watch.log"


@pytest.mark.parametrize("among", ["adapter", "control", "engines", "freezing", "methods", "trainer"])
def test_who_trains_meets_no_error_but_those_of_this_package(among: str) -> None:
    """docs/errors.md says so. What Python itself asks for, and what nobody can meet, is none of them."""
    raised = {
        node.exc.func.id
        for file, tree in trees().items()
        if file.split("/")[0].removesuffix(".py") == among
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    foreign = {name for name in raised if hasattr(builtins, name)}
    assert foreign <= {"AssertionError", "AttributeError", "NotImplementedError"}
    assert raised
