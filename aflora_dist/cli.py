"""The `aflora` command."""

from __future__ import annotations

import sys

USAGE = """usage: aflora train [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...]

  train   fine-tune with AFLoRA; `aflora train --help` lists all options
          (several processes: accelerate launch -m aflora_dist.training.run ...)
"""


def main() -> int:
    """Dispatch to a subcommand; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        from .training.run import main as train

        return train(arguments[1:])
    wanted_help = arguments[:1] in (["--help"], ["-h"])
    print(USAGE, end="", file=sys.stdout if wanted_help else sys.stderr)
    return 0 if wanted_help else 2


if __name__ == "__main__":
    sys.exit(main())
