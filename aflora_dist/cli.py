"""The `aflora` command."""

from __future__ import annotations

import sys

USAGE = """usage: aflora train [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...]
       aflora show RUN [--figures FOLDER]
       aflora collect FOLDER [--json FILE]
       aflora to-lora RUN OUT
       aflora merge RUN OUT [--base MODEL] [--max-shard-size SIZE]

  train   fine-tune with AFLoRA; `aflora train --help` lists all options
          (several processes: accelerate launch -m aflora_dist.training.run ...)
  show    a run's story in the terminal, finished or not; its figures as PNG or SVG
  collect the runs under a folder as a table: mean and deviation over seeds
  to-lora a run's adapter as plain LoRA, for whatever serves LoRA
  merge   a run's adapter in its model's weights, for whatever serves models
"""


def main() -> int:
    """Dispatch to a subcommand and import nothing for the others; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        from .training.run import main as train

        return train(arguments[1:])
    if arguments[:1] == ["show"]:
        from .view.show import main as show

        return show(arguments[1:])
    if arguments[:1] == ["collect"]:
        from .view.collect import main as collect

        return collect(arguments[1:])
    if arguments[:1] in (["to-lora"], ["merge"]):
        from .serve.main import main as serve

        return serve(arguments[0], arguments[1:])
    if arguments[:1] in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    print(USAGE, end="", file=sys.stderr)
    if arguments:
        print(f"\naflora: error: There is no command {arguments[0]!r}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
