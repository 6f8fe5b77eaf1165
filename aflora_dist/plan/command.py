"""`aflora plan`, and the dry run of `aflora train`: print the plan, train nothing, write nothing."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState

from ..errors import AFLoRAError
from ..notices import quiet_libraries
from ..options import Config
from ..store.resume import find, finished
from ..store.rundir import RunDirectory, refuse_own_input, refuse_taken
from ..training.build import create_accelerator
from ..training.command_line import parse, split_line
from .launches import ENGINES, Launch
from .plan import make_plan, refusal_of
from .report import print_plan

_DESCRIPTION = """What a run will train, freeze and hold, without weights and without a GPU. Takes what `aflora
train` takes, and refuses what it would refuse."""


def _own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aflora plan",
        usage="%(prog)s [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...] [options]",
        description=_DESCRIPTION,
        epilog="`aflora train --help` lists the options of the configuration.",
        allow_abbrev=False,
    )
    parser.add_argument("--examples", type=int, help="training examples; else the data are read and tokenised")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="all by default")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 8], help="numbers of processes (1 2 8)")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="bf16", help="bf16 by default")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    return parser


def main(arguments: list[str]) -> int:
    """`aflora plan`; returns the exit status."""
    quiet_libraries()
    options, rest = _own_options().parse_known_args(arguments)
    config, resolved = parse(rest)
    refuse_own_input(config, split_line(rest)[0])
    launches = _launches(options.engines, options.ranks, options.mixed_precision)
    if options.examples is not None and options.examples < 1:
        raise AFLoRAError(f"--examples must be at least 1, got {options.examples}.")
    PartialState(cpu=True)  # a plan needs no GPU, and takes none
    with redirect_stdout(sys.stderr):  # what is said of the data is not part of the plan
        _refuse_resuming(config, resolved, Accelerator(cpu=True))
        plan = make_plan(config, launches, examples=options.examples)
    if options.json:
        print(json.dumps(asdict(plan), indent=1))
    else:
        print_plan(plan)
    return 0


def _launches(engines: list[Any] | None, ranks: list[int], precision: str) -> list[Launch]:
    """Those that make sense: one process is its own engine, and ZeRO only if it was asked for."""
    for number in ranks:
        if number < 1:
            raise AFLoRAError(f"--ranks must be at least 1, got {number}.")

    def fits(engine: str, number: int) -> bool:
        if number == 1:
            return engine == "single" or (engines is not None and engine.startswith("zero"))
        return engine != "single"

    found = [
        Launch(engine=engine, num_processes=number, mixed_precision=precision)
        for engine in engines or ENGINES
        for number in dict.fromkeys(ranks)
        if fits(engine, number)
    ]
    if not found:
        raise AFLoRAError("Nothing to plan: the engine single is one process, ddp and fsdp2 are several (--ranks).")
    return found


def _refuse_resuming(config: Config, resolved: str, accelerator: Accelerator) -> None:
    """Raise an AFLoRAError if run.resume cannot be done, where the folder is this run's. A collective."""
    if config.run.resume is not None and refusal_of(refuse_taken, config.run) is None:
        run = RunDirectory(config.run, accelerator)
        if finished(run, resolved) is None:
            find(run, resolved, accelerator)


def dry_run(config: Config, resolved: str) -> None:
    """The plan of the launch that this process is part of, once, and where the run would write. A collective.

    Raises an AFLoRAError on every rank if the run would be refused.
    """
    accelerator = create_accelerator(config)
    if accelerator.state.deepspeed_plugin is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or ZeRO-3 would shard the model that is made on the meta device
    _refuse_resuming(config, resolved, accelerator)
    plan = make_plan(config, [Launch.of(accelerator)])
    if accelerator.is_main_process:
        print_plan(plan)
    accelerator.wait_for_everyone()
    accelerator.end_training()
