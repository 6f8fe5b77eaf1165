"""The `aflora` command."""

from __future__ import annotations

import sys
from importlib import import_module

from .errors import AFLoRAError, told_of_long_names
from .extras import require
from .notices import ended_reading, write_anything
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
  plan    what that would train, freeze and hold, without weights or a GPU
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


# Name -> the module whose `main` is given what follows, and returns the exit status; whether it needs all of training.
_COMMANDS = {
    "train": ("training.run", False),  # which looks for it itself: it is started without this module, too
    "plan": ("plan.command", True),
    "data": ("view.examples", True),
    "launch-files": ("launch_files", False),
    "show": ("view.show", False),
    "trace": ("view.trace", False),
    "collect": ("view.collect", False),
    "study": ("study.command", False),
    "reproduce": ("study.command", False),
    "predict": ("predict.command", False),
    "to-lora": ("serve.main", False),
    "merge": ("serve.main", False),
}
_TOLD = ("study.command", "serve.main")  # which of their two commands it is


def main() -> int:
    """Run the command; returns the exit status."""
    return run(sys.argv[1:])


def run(line: list[str]) -> int:
    """Run a command and import nothing for the others. What a user did wrong is said here, in a line or two."""
    name, *arguments = line or [""]
    write_anything()
    try:
        if name in _COMMANDS:
            module, trains = _COMMANDS[name]
            if trains:
                require("train", f"aflora {name}")
            start = import_module(f".{module}", __package__).main
            with told_of_long_names():
                status = int(start(name, arguments) if module in _TOLD else start(arguments))
                print(end="", flush=True)  # and a closed standard output is none
                return status
    except AFLoRAError as error:
        print(f"aflora: error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not ended_reading(sys.stdout):
            raise
        return 1
    except KeyboardInterrupt:
        print("aflora: interrupted.", file=sys.stderr)
        return 130
    if name == "--version":
        print(f"aflora-dist {__version__}")
        return 0
    asked = name in ("--help", "-h")
    print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
    if name and not asked:
        print(f"\naflora: error: There is no command {name!r}.", file=sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
