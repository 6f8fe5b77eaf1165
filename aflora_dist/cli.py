"""The `aflora` command."""

from __future__ import annotations

import sys

from .errors import AFLoRAError
from .extras import require
from .version import __version__

USAGE = """usage: aflora train [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...]
       aflora plan [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...] [--ranks N ...]
       aflora data [FILE|NAME|CONFIG.yaml] [--GROUP.KEY VALUE ...] [--show N]
       aflora launch-files FOLDER
       aflora show RUN [--figures FOLDER]
       aflora trace RUN [--ranks N ...] [--json FILE]
       aflora collect FOLDER [--json FILE]
       aflora study FILE.yaml [--small] [--dry_run] [--GROUP.KEY VALUE ...]
       aflora reproduce [NAME] [--small] [--dry_run] [--GROUP.KEY VALUE ...]
       aflora predict RUN|ADAPTER FILE [--out OUT]
       aflora to-lora RUN OUT
       aflora merge RUN OUT [--base MODEL] [--max-shard-size SIZE] [--trust_remote_code]
       aflora --version

  train   fine-tune with AFLoRA; `aflora train --help` lists all options
          (several processes: accelerate launch -m aflora_dist.training.run ...)
  plan    what that would train, freeze, hold and move, without weights or a GPU
  data    what a training would be given: examples, which tokens carry loss, lengths, labels
  launch-files
          write the configurations for `accelerate launch`, and the Slurm scripts, into a folder
  show    a run's story in the terminal, finished or not; its figures as PNG or SVG
  trace   profiler traces before, during and after the freezing, range by range and rank by rank
  collect the runs under a folder as a table: mean and deviation over seeds
  study   a grid of trainings, shared by whoever runs the same command; tables with honest differences
  reproduce
          the studies that come along: the paper's tables, and controls of them
  predict label a file with a run's model, or have its prompts answered, row for row
          (several processes: accelerate launch -m aflora_dist.predict ...)
  to-lora a run's adapter as plain LoRA, for whatever serves LoRA
  merge   a run's adapter in its model's weights, for whatever serves models
"""


def main() -> int:
    """Run the command; returns the exit status."""
    try:
        return _run(sys.argv[1:])
    except AFLoRAError as error:
        print(f"aflora: error: {error}", file=sys.stderr)
        return 2


def _run(line: list[str]) -> int:
    """Dispatch to a subcommand and import nothing for the others."""
    match line:
        case ["train", *arguments]:
            from .training.run import main as train

            return train(arguments)
        case ["plan", *arguments]:
            require("train", "aflora plan")
            from .plan.command import main as plan

            return plan(arguments)
        case ["data", *arguments]:
            require("train", "aflora data")
            from .view.examples import main as data

            return data(arguments)
        case ["launch-files", *arguments]:
            from .launch_files import main as launch_files

            return launch_files(arguments)
        case ["show", *arguments]:
            from .view.show import main as show

            return show(arguments)
        case ["trace", *arguments]:
            from .view.trace import main as trace

            return trace(arguments)
        case ["collect", *arguments]:
            from .view.collect import main as collect

            return collect(arguments)
        case ["study" | "reproduce" as command, *arguments]:
            from .study.command import main as study

            return study(command, arguments)
        case ["predict", *arguments]:
            from .predict.command import main as predict

            return predict(arguments)
        case ["to-lora" | "merge" as command, *arguments]:
            from .serve.main import main as serve

            return serve(command, arguments)
        case ["--version"]:
            print(f"aflora-dist {__version__}")
            return 0
        case ["--help" | "-h", *_]:
            print(USAGE, end="")
            return 0
        case [*arguments]:
            print(USAGE, end="", file=sys.stderr)
            if arguments:
                print(f"\naflora: error: There is no command {arguments[0]!r}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
