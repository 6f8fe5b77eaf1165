"""Errors that a person can act on. Their message is what is shown, so it says what to do instead."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class AFLoRAError(ValueError):
    """Something the user asked for cannot be done as asked.

    Attributes:
        count: How many there have been in this process: who warns at its end is silent where one explains it.
    """

    count: ClassVar[int] = 0

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        AFLoRAError.count += 1

    def __str__(self) -> str:
        """In letters that only show: what is quoted in it may be of a file that was made to command a terminal."""
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in super().__str__())


class UnsupportedEngineError(AFLoRAError):
    """The way training was set up cannot be frozen exactly; the message says what to use instead."""


class LaunchError(AFLoRAError):
    """This process was started as no rank of its job can be. The others may not notice, so each says it."""


class DivergedError(AFLoRAError):
    """Training broke down: a loss or a freezing score is not finite."""


class StepError(AFLoRAError, RuntimeError):
    """A training step cannot be taken: torch's own errors of a step are RuntimeErrors, too."""


class ExistsError(AFLoRAError, FileExistsError):
    """Something would be written over."""


class DamagedError(AFLoRAError):
    """A checkpoint is not what was written, or no training can go on from it."""


def one_line(error: BaseException) -> str:
    """What an exception of others says, to be quoted in an error of ours."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:300]


@contextmanager
def told_of_long_names() -> Iterator[None]:
    """Turn a name that no file system takes, as a text in the place of a file's, into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise AFLoRAError(
            f"{str(error.filename or error)[:100]}... is no file or folder: its name is too long."
        ) from None


@contextmanager
def writing(what: str, path: Path, then: str = "") -> Iterator[None]:
    """Turn a full disk and the like into an error that says what could not be written, where, and what to do then."""
    try:
        yield
    except _of_writing() as error:
        reason = getattr(error, "strerror", None) or error
        raise AFLoRAError(f"{what} could not be written to {path}: {reason}. {then}".rstrip()) from None


def _of_writing() -> tuple[type[Exception], ...]:
    """What writing raises. safetensors hides a full disk in an error of its own; if unimported, it raised none."""
    safetensors = sys.modules.get("safetensors")
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)
