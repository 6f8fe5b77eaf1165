"""`aflora to-lora` and `aflora merge`: their command lines."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..notices import quiet_libraries

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(command: str, arguments: list[str]) -> int:
    """Run one of the two; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"aflora {command}",
        description={
            "to-lora": "Write the adapter as a plain LoRA adapter of the same function. Reads its file alone.",
            "merge": "Write the model with the adapter in its weights, tensor by tensor. Needs no GPU.",
        }[command],
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory (run.dir), or an adapter's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet, or is empty")
    if command == "merge":
        parser.add_argument("--base", metavar="MODEL", help="folder or hub id, instead of what the adapter names")
        parser.add_argument(
            "--max-shard-size",
            type=_size,
            default=2 * 10**9,
            metavar="SIZE",
            help="of a file of weights, and so of what memory holds of the model: 500MB, 2GB (default)",
        )
        parser.add_argument(
            "--trust_remote_code",
            "--trust-remote-code",
            action="store_true",
            help="run modelling code that lies in the base model's folder; nothing that is read can ask for it",
        )
    args = parser.parse_args(arguments)
    if command == "merge":
        from .merge import merge

        quiet_libraries()  # what of the base model is not loaded as it lies there is told below
        said = merge(args.run, args.out, args.base, args.max_shard_size, args.trust_remote_code)
    else:
        from .lora import to_lora

        said = to_lora(args.run, args.out)
    print(f"wrote {args.out}/")
    for sentence in said:
        print(f"aflora: note: {sentence}")
    return 0


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.upper())
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 2GB")
    return int(found[1]) * _UNITS[found[2] or ""]
