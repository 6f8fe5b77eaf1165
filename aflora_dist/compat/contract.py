"""Private interfaces of other libraries: what is said of each, and what happens when one is gone.

Each library's are in one list, in the file of this folder that is named after it. They are looked for before they are
used, so that a newer release that lacks one is an error in the first second, which names the release to install, and
not an exception at a first freeze hours later. `python -m aflora_dist.compat.contract` prints the lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from ..errors import UnsupportedEngineError

# The releases that everything was tried with, and the files of this folder.
SEEN = {
    "torch": "2.13.0",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "transformers": "5.23.0",
    "python": "3.11",
}


@dataclass(frozen=True)
class Private:
    """One private interface.

    Attributes:
        owner: The class or module that has it.
        name: The attribute.
        why: What it is needed for.
        instead: The public way that would replace it.
        since: The first release that has it, where an older one that is supported does without.
        anywhere: It is read, called or overridden where it is needed; all others are for compat alone.
    """

    owner: str
    name: str
    why: str
    instead: str
    since: str = ""
    anywhere: bool = False


def private(
    owner: str, names: str, why: str, instead: str, *, since: str = "", anywhere: bool = False
) -> list[Private]:
    """Entries for interfaces of one owner that are needed to the same end; `names` has spaces between them."""
    return [Private(owner, name, why, instead, since, anywhere) for name in names.split()]


def is_older(library: str, release: str) -> bool:
    """Whether what is installed of the library came before this release."""
    return Version(version(library)) < Version(release)


def require_private(library: str, owner: Any, entries: Iterable[Private]) -> None:
    """Raise an UnsupportedEngineError, with the release to install, unless `owner` has what its release is to have."""
    for entry in entries:
        if not hasattr(owner, entry.name) and not (entry.since and is_older(library, entry.since)):
            raise UnsupportedEngineError(
                f"{library} {version(library)} has no {entry.owner}.{entry.name}, which is needed to {entry.why}. "
                f"aflora_dist was tried with {library} {SEEN[library]}: install that release."
            )


def broken(library: str, what: str, error: Exception) -> UnsupportedEngineError:
    """The error for a rehearsal that failed: an interface is there, but does something else."""
    tried, here = SEEN[library], version(library)
    same = Version(here).base_version == tried
    then = "the release that is here: something else is amiss" if same else f"here is {here}: install that release"
    return UnsupportedEngineError(
        f"{what} failed when it was rehearsed, before training ({type(error).__name__}: {error}). aflora_dist was "
        f"tried with {library} {tried}, {then}."
    )


def lists() -> dict[str, list[Private]]:
    """Every library's list."""
    return {library: import_module(f"aflora_dist.compat.{library}").PRIVATE for library in SEEN}


_PAGE = """\
# Private interfaces

PyTorch, accelerate, DeepSpeed, PEFT and transformers have no public way to take parameters out of a training. What is
used instead is listed here and in `aflora_dist/compat/`, a file for each library; a test reads the code and fails on
what is not listed. It is looked for before it is used, but for what lies on objects that are made later, and attaching
the freezing rehearses a drop of nothing and a snapshot restored: a release that breaks it says so in the first second,
with the release to install.

This page is written by `python -m aflora_dist.compat.contract > docs/private.md`."""


def main() -> None:
    """Print every list as a page of the documentation, a line for what one owner has to one end."""
    print(_PAGE)
    for library, entries in lists().items():
        print(f"\n## {library} {SEEN[library]}\n\n| interface | needed to | until there is |\n|---|---|---|")
        rows: dict[tuple[str, str, str, str], list[str]] = {}
        for e in entries:
            rows.setdefault((e.since, e.owner, e.why, e.instead), []).append(f"`{e.name}`")
        for (since, owner, why, instead), names in rows.items():
            first = f" (since {since})" if since else ""
            print(f"| {', '.join(names)} of `{owner}`{first} | {why} | {instead} |")


if __name__ == "__main__":
    main()
