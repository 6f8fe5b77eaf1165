"""Entry point of `aflora train`: `accelerate launch -m aflora_dist.training.run [CONFIG.yaml] [--key value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import AFLoRAError
from ..extras import require
from ..leaving import guarded, leave
from ..notices import from_launcher, logger, quiet_libraries, write_anything


def main(arguments: list[str] | None = None) -> int:
    """Run `aflora train`; returns the exit status. What a user did wrong is said in a line or two."""
    write_anything()
    undo = quiet_libraries()
    given = sys.argv[1:] if arguments is None else arguments
    then = "The same command with --resume goes on from the last checkpoint."
    return guarded(lambda: _run(given, undo), "training", then)


def _run(arguments: list[str], undo: Callable[[], None]) -> None:
    """`aflora train`; `undo` takes back that libraries are quiet."""
    require("train", "aflora train")
    from .command_line import parse, split_line

    config, resolved = parse(arguments)
    from ..store.rundir import refuse_own_input  # after parsing: a wrong option should not take seconds to find

    refuse_own_input(config, split_line(arguments)[0])
    quiet = undo if config.run.verbose else quiet_libraries
    if config.run.dry_run:
        from ..plan.command import dry_run

        quiet()
        dry_run(config, resolved)
        return
    from .loop import train

    quiet()  # DeepSpeed sets its own level on import
    result = train(config, resolved)
    if from_launcher("RANK", "0") == "0" and result is not None:
        from ..serve.lora import leave_stock
        from ..store.records import as_result
        from ..view.report import print_summary

        try:
            leave_stock(Path(config.run.dir))
        except AFLoRAError as error:  # what was trained is whole
            logger.warning(f"lora/, which `aflora to-lora` makes at any time, is missing: {error}")
        print_summary(as_result(result), config.run.dir)


if __name__ == "__main__":
    leave(main())
