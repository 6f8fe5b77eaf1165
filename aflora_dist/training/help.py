"""`aflora train --help`: what most people need first, on one screen; the options of a group, and all, if asked for."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from ..compat.python import options_of

_FIRST = {
    "preset": "settings of a paper, or of a demo: demo, sft/demo, glue/cola, llm/gsm8k",
    "model.name": "a hub id, a folder, a .gguf file, or demo",
    "data.task": "files (labels), sft (a language model), demo, or one of GLUE's",
    "data.train_file": "CSV, TSV, JSON lines, JSON or parquet",
    "data.validation_file": "likewise; or --data.hold_out N takes N examples out of the former",
    "data.name": "instead: a data set of the hub, or a folder like one",
    "data.columns": """which columns are meant, as in '{"prompt": "question"}'""",
    "data.max_length": "tokens after which texts are cut",
    "method.name": "aflora, full, or one of PEFT's: lora, vera, ...",
    "train.epochs": "passes over the training data; or --train.max_steps N",
    "train.batch_size": "examples in an update, over all ranks",
    "train.learning_rate": "its peak; --train.schedule says how it goes on",
    "run.dir": "where all goes: logs, checkpoints, result.json, adapter/",
    "run.resume": "go on from the last checkpoint; --resume will do",
    "run.dry_run": "print the plan, and train nothing; --dry_run will do",
}


def help_text(parser: Any, groups: Mapping[str, Any], asked: str) -> str:
    """What `--help`, `--help GROUP` or `--help all` print.

    Args:
        parser: A jsonargparse parser of the options.
        groups: Their names, with the dataclass of each.
        asked: A group, "all", or "" for the first screen.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    actions = {name: action for name, action in options_of(parser).items() if name in _FIRST or "." in name}
    usage = parser.format_usage().strip()
    if asked:
        chosen = [name for name in actions if asked in ("all", name.partition(".")[0])]
        return "\n".join([usage, "", *(_in_full(actions[name], width) for name in chosen)])
    lines = [usage, "", *textwrap.wrap(parser.description, width), "", "First of all:"]
    lines += [f"  --{name:<21} {said}" for name, said in _FIRST.items()]
    lines += ["", "Groups of options; `aflora train --help GROUP` lists one, `--help all` all:"]
    for name, kind in groups.items():
        count = sum(option.startswith(f"{name}.") for option in actions)
        said = kind.__doc__.strip().splitlines()[0].partition(";")[0].rstrip(".")
        lines.append(f"  {name:<10} {count:>3}  {said}")
    return "\n".join(lines)


def _in_full(action: Any, width: int) -> str:
    said = textwrap.fill(" ".join(action.help.split()), width, initial_indent="      ", subsequent_indent="      ")
    return f"  --{action.dest} (default: {'none' if action.default is None else action.default})\n{said}"
