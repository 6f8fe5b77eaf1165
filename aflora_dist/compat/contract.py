"""Private interfaces of other libraries: where they are listed, and what happens when one is gone.

Each library's are in one list: torch's and accelerate's in engines/private.py, DeepSpeed's in
engines/deepspeed/private.py, PEFT's in adapter/private.py, transformers' in trainer.py, torch's recorder of CUDA memory
(for --profile) in watch/memory.py. They are looked for before they are used, so that a newer release that lacks one is
an error in the first second, which names the release to install, and not an exception at a first freeze hours later.
`python -m aflora_dist.compat.contract` prints the lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from ..errors import UnsupportedEngineError

# The releases that everything was tried with.
SEEN = {"torch": "2.13.0", "accelerate": "1.15.0", "deepspeed": "0.19.8", "peft": "0.21.2", "transformers": "5.23.0"}
LISTS = (
    "aflora_dist.engines.private",
    "aflora_dist.engines.deepspeed.private",
    "aflora_dist.adapter.private",
    "aflora_dist.trainer",
    "aflora_dist.watch.memory",
)


@dataclass(frozen=True)
class Private:
    """One private interface.

    Attributes:
        owner: The class or module that has it.
        name: The attribute.
        why: What it is needed for.
        instead: The public way that would replace it.
        since: The first release that has it, where an older one that is supported does without.
    """

    owner: str
    name: str
    why: str
    instead: str
    since: str = ""


def is_older(library: str, release: str) -> bool:
    """Whether what is installed of the library came before this release."""
    return Version(version(library)) < Version(release)


def require(library: str, owner: Any, entries: Iterable[Private]) -> None:
    """Raise unless `owner` has all of these attributes that this release of the library is to have.

    Raises:
        UnsupportedEngineError: Names the first one that is missing, and the release that has it.
    """
    for entry in entries:
        if not hasattr(owner, entry.name) and not (entry.since and is_older(library, entry.since)):
            raise UnsupportedEngineError(
                f"{library} {version(library)} has no {entry.owner}.{entry.name}, which is needed to {entry.why}. "
                f"aflora_dist was tried with {library} {SEEN[library]}: install that release."
            )


def broken(library: str, what: str, error: Exception) -> UnsupportedEngineError:
    """The error for a rehearsal that failed: an interface is there, but does something else."""
    return UnsupportedEngineError(
        f"{what} failed when it was rehearsed, before training ({type(error).__name__}: {error}). aflora_dist was "
        f"tried with {library} {SEEN[library]}, here is {version(library)}: install that release."
    )


def main() -> None:
    """Print every list as a Markdown table."""
    print("| library | seen on | interface | needed to | until there is |\n|---|---|---|---|---|")
    for module in LISTS:
        for library, entries in import_module(module).PRIVATE.items():
            for e in entries:
                seen = f"{e.since} to {SEEN[library]}" if e.since else SEEN[library]
                print(f"| {library} | {seen} | `{e.owner}.{e.name}` | {e.why} | {e.instead} |")


if __name__ == "__main__":
    main()
