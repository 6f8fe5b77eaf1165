"""`aflora launch-files FOLDER`: the launch configurations and Slurm scripts, for who has no clone of the repository."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from .errors import writing

_IN_WHEEL = Path(__file__).parent / "_launch_files"  # put there by pyproject.toml
_SOURCE = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parent.parent  # or a clone, where they lie at the top


def files(folder: Path) -> Iterator[tuple[Path, str]]:
    """All files below launch/ and ds_configs/, and their content as it is to be in `folder`.

    In a clone, launch configurations name DeepSpeed's files from its top. Where a user will start from is not known,
    so that these name them from the root of the file system.
    """
    for part in ("launch", "ds_configs"):
        for path in sorted(file for file in (_SOURCE / part).rglob("*") if file.is_file()):
            name, text = path.relative_to(_SOURCE), path.read_text(encoding="utf-8")
            if name.suffix == ".yaml":
                text = re.sub(
                    r"(?<=deepspeed_config_file: )(ds_configs/.+)", lambda found: _quoted(folder, found), text
                )
            yield name, text


def _quoted(folder: Path, found: re.Match[str]) -> str:
    """As a YAML scalar, whatever characters the folder's name has."""
    return "'" + str(folder.resolve() / found[1]).replace("'", "''") + "'"


def write(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write all files that `folder` does not have; one that is there already may be a user's, and stays.

    Returns:
        Which were written, and which were there with other content, by their names in `folder`.

    Raises:
        AFLoRAError: The folder cannot be written.
    """
    written, others = [], []
    for name, text in files(folder):
        path = folder / name
        with writing("The launch files", folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = path.open("x", encoding="utf-8")
            except FileExistsError:
                if not path.is_file() or path.read_bytes() != text.encode():
                    others.append(name)
                continue
            try:
                with file:
                    file.write(text)
            except OSError:
                path.unlink()  # a part of a file would be taken for a user's
                raise
            written.append(name)
    return written, others


def main(arguments: list[str]) -> int:
    """`aflora launch-files`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="aflora launch-files",
        description="Write launch/ (for accelerate launch --config_file, and for Slurm) and ds_configs/ (what those "
        "for DeepSpeed name) into a folder. What is there already stays as it is.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made where it does not exist")
    args = parser.parse_args(arguments)
    written, others = write(args.folder)
    print(f"wrote {len(written)} files below {args.folder}")
    for name in others:
        print(f"aflora: note: {args.folder / name} was there already, with other content, and stays as it is.")
    example = shlex.quote(str(args.folder / "launch" / "zero2.yaml"))
    print(f"accelerate launch --config_file {example} -m aflora_dist.training.run ...")
    return 0
