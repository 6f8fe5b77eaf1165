"""Python's own private interfaces, 3.11 and later. Imports nothing but what lists them."""

from __future__ import annotations

from .contract import private

PRIVATE = [
    *private(
        "ModuleSpec",
        "know that PEFT's import is under way, and when it has ended",
        "a public hook after an import",
        "_initializing",
        anywhere=True,
    ),
    *private(
        "atexit",
        "run exit handlers where the interpreter is not taken down",
        "a way to end a process with threads of gloo's in it (pytorch/pytorch#190489)",
        "_run_exitfuncs",
        anywhere=True,
    ),
    *private(
        "os",
        "end a process without taking the interpreter down",
        "a way to end a process with threads of gloo's in it (pytorch/pytorch#190489)",
        "_exit",
        anywhere=True,
    ),
]
