"""Python's own private interfaces, 3.11 and later."""

from __future__ import annotations

import argparse

from .contract import Private, private

_TAKEN_DOWN = "an interpreter that threads of gloo's do not abort as it is taken down (pytorch/pytorch#190489)"

PRIVATE: list[Private] = [
    *private(
        "ModuleSpec",
        "_initializing",
        "know that PEFT's import is under way, and when it has ended",
        "a public hook after an import",
        anywhere=True,
    ),
    *private("atexit", "_run_exitfuncs", "run exit handlers before `os._exit`", _TAKEN_DOWN, anywhere=True),
    *private("os", "_exit", "end a process without taking the interpreter down", _TAKEN_DOWN, anywhere=True),
    *private(
        "argparse.ArgumentParser",
        "_actions",
        "write a help of our own, group by group",
        "a public list of a parser's options",
    ),
]


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """A parser's options by where their values go."""
    return {action.dest: action for action in parser._actions}
