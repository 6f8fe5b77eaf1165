"""The main job's options as a command line gives them: defaults < preset < YAML file < command line."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from ..errors import AFLoRAError
from ..options import Config, ProfileConfig
from ..tasks.glue import TASKS
from ..watch.trackers import TENSORBOARD, check_trackers
from .config_file import Places, look_through
from .presets import PRESETS

_GROUPS = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
_OPTIONS: dict[str, Any] = {  # name -> type
    "preset": str | None,
    **{f"{group}.{name}": hint for group, kind in _GROUPS.items() for name, hint in get_type_hints(kind).items()},
}
_LISTS = {f"--{name}" for name, hint in _OPTIONS.items() if "list[" in str(hint)}
_FLAGS = {"--profile": "--profile.enabled", "--dry_run": "--run.dry_run", "--dry-run": "--run.dry_run"}
# What `accelerate launch` takes, or other launchers add, and people write behind the module.
_LAUNCHER = re.compile(
    r"--(local[_-]rank|num_processes|num_machines|mixed_precision|config_file|deepspeed|use_\w+|main_\w+"
    r"|zero_stage|multi_gpu|machine_rank|cpu)\b"
)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="aflora train",
        usage="%(prog)s [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...]",
        description="Fine-tune a sequence classifier or a language model with AFLoRA. Start it with `accelerate "
        "launch -m aflora_dist.training.run ...` to use several processes or DeepSpeed.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; also as first argument.")
    parser.add_class_arguments(Config)
    return parser


def parse(arguments: list[str]) -> tuple[Config, str]:
    """The configuration that a command line asks for, and the same as YAML with everything resolved.

    Raises:
        AFLoRAError: An unknown option, preset or value; the message names it.
        SystemExit: After printing the help that was asked for.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    arguments = _shorthands(arguments)
    parser = _parser()
    places: Places = {}
    for path in _files(arguments):
        nullable = {name: type(None) in get_args(hint) for name, hint in _OPTIONS.items()}
        places |= look_through(path, _GROUPS, nullable, {"method.options"})
    try:
        preset = parser.parse_args(arguments).preset
        parser.set_defaults({"model.name": ""} | (_preset(preset) if preset is not None else {}))
        namespace = parser.parse_args(arguments)
    except Exception as error:  # jsonargparse raises many kinds
        raise AFLoRAError(_readable(error, arguments, places)) from None
    namespace.pop("config", None)  # the files it came from
    _name_model(namespace)
    _rename_tensorboard(namespace)
    _refuse_code(namespace, arguments, places)
    config = Config(**parser.instantiate(namespace).as_dict())
    _check(config)
    if config.method.name != "aflora":
        _refuse_aflora_options(config, parser.get_defaults())
    return config, parser.dump(namespace, skip_unset=False)


def _refuse_code(namespace: Any, arguments: list[str], places: Places) -> None:
    """Raise where a file, and not the command line itself, would have code run that comes with a model or a kernel."""
    asks = {
        "model.trust_remote_code": namespace["model.trust_remote_code"],
        "model.attn_implementation": "/" in (namespace["model.attn_implementation"] or ""),  # of the hub
    }
    for option, code in asks.items():
        if code and not any(argument.partition("=")[0] == f"--{option}" for argument in arguments):
            raise AFLoRAError(
                f"{places.get(option, 'A file')}: only the command line can have code of others run. Read that code, "
                f"then add --{option} {str(namespace[option]).lower()}."
            )


def _refuse_aflora_options(config: Config, defaults: Any) -> None:
    """Raise for what was asked of AFLoRA where another method trains; a preset says it to whom it may concern."""
    for group in ("adapter", "freezing"):
        chosen, usual = asdict(getattr(config, group)), defaults[group]
        for option, value in chosen.items():
            if value != usual[option]:
                raise AFLoRAError(
                    f"{group}.{option}={value} is for AFLoRA, and method.name={config.method.name}. Options of other "
                    f"methods are given as --method.options '{{\"NAME\": VALUE, ...}}'."
                )


def _name_model(namespace: Any) -> None:
    """The demo's model where the demo's data are trained on and none is named; other data need one."""
    if namespace["model.name"]:
        return
    task, name = namespace["data.task"], namespace["data.name"]
    if task != "demo" and (task, name) != ("sft", "demo"):
        raise AFLoRAError(
            f"data.task={task} needs a model: name a hub id or a folder with --model.name, or take the demo's small "
            f"one with --model.name demo."
        )
    namespace["model.name"] = "demo"


def _rename_tensorboard(namespace: Any) -> None:
    """run.tensorboard of earlier releases' files as run.trackers has it."""
    if (wanted := namespace["run.tensorboard"]) is not None:
        others = [name for name in namespace["run.trackers"] if name != TENSORBOARD]
        namespace["run.trackers"] = [TENSORBOARD, *others] if wanted else others
        namespace["run.tensorboard"] = None


def _files(arguments: list[str]) -> Iterator[str]:
    """YAML files; `--config` takes the text of one, too."""
    for i, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if argument == "--config" and i + 1 < len(arguments):
            value = arguments[i + 1]
        if option == "--config" and value and value[0] != "{":
            yield value


def _shorthands(arguments: list[str]) -> list[str]:
    """`--profile`, `--dry_run`, `--resume`, `--resume PATH`, and lists without brackets written out."""
    result: list[str] = []
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else "-"
        option, sign, value = argument.partition("=")
        if option in _FLAGS:
            said = "" if following in ("true", "false") and not sign else f"={value or 'true'}"
            result.append(_FLAGS[option] + said)
        elif option == "--resume":
            result.append("--run.resume" if following[0:1] != "-" and not sign else f"--run.resume={value or 'last'}")
        elif option in _LISTS and sign:
            result.append(f"{option}={_bracketed(value)}")
        elif i and arguments[i - 1] in _LISTS:
            result.append(_bracketed(argument))
        else:
            result.append(argument)
    return result


def _bracketed(value: str) -> str:
    """`wandb,mlflow` as `[wandb,mlflow]`."""
    return value if value[:1] in ("[", "{") or value in ("", "null") else f"[{value}]"


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise AFLoRAError(f"There is no preset {name!r}. Presets: {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]


def _readable(error: Exception, arguments: list[str], places: Places) -> str:
    """What jsonargparse complains of, in a line."""
    text = str(error)
    if isinstance(error, AFLoRAError):
        return text
    if (found := re.match(r'Parser key "([\w.]+)"', text)) and found[1] in _OPTIONS:
        name = found[1]
        given = re.findall(r"(?:Got|Given) value: *(.*)", text) or [""]
        from_file = name in places and not any(a.partition("=")[0] == f"--{name}" for a in arguments)
        where = f"{places[name]}: " if from_file else ""
        return f"{where}{name} must be {_in_words(_OPTIONS[name])}, not {given[-1][:80] or 'empty'}."
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        return f"There is no option {found[1]}. {_instead(found[1].partition('=')[0])}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return f"{text.rstrip('.')}. See --help for all options."


def _in_words(hint: Any) -> str:
    """A type.

    >>> _in_words(list[int] | None), _in_words(Literal["cubic", "quadratic"])
    ('a list of whole numbers, as in [1, 2], or null', 'one of cubic, quadratic')
    """
    if type(None) in get_args(hint):
        (kind,) = (kind for kind in get_args(hint) if kind is not type(None))
        return f"{_in_words(kind)}, or null"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text (put numbers, and yes and no, into quotes)",
        list[int]: "a list of whole numbers, as in [1, 2]",
        list[str]: "a list of texts, as in [a, b]",
    }.get(hint, 'names and values, as in {"r": 8}')


def _instead(unknown: str) -> str:
    """What may have been meant by an option that there is not."""
    if not unknown.startswith("--"):
        return "Options begin with `--`; lists are written [a, b], or a,b; a file comes first."
    if _LAUNCHER.match(unknown):
        return (
            "It is the launcher's, and stands before the module: `accelerate launch OPTIONS -m "
            "aflora_dist.training.run ...`; other launchers than that and torchrun are not known."
        )
    last = unknown.replace("-", "_").lstrip("_").rpartition(".")[2]
    fields = {name: name.rpartition(".")[2] for name in _OPTIONS}
    same = [name for name, field in fields.items() if last in (field, "".join(word[0] for word in field.split("_")))]
    close = same or get_close_matches(unknown.lstrip("-"), [*_OPTIONS], n=1, cutoff=0.75)
    return f"Did you mean --{' or --'.join(close)}?" if close else "See --help for all options."


def _check(config: Config) -> None:
    """What can be wrong with single values; what depends on data and devices is checked where it is known."""
    train, data = config.train, config.data
    for group in _GROUPS:
        for name, number in asdict(getattr(config, group)).items():
            if isinstance(number, float) and not math.isfinite(number):
                raise AFLoRAError(f"{group}.{name} must be a finite number, not {number}.")
    t_i, t_f = config.freezing.epochs(train.epochs)
    at_least_one = {
        "run.log_every": config.run.log_every,
        "run.keep": config.run.keep,
        "run.patience": 1 if config.run.patience is None else config.run.patience,
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "train.accumulation": train.accumulation,
        "train.eval_batch_size": train.eval_batch_size,
        "data.max_length": data.max_length,
        "data.tokens_per_micro_batch": 1 if data.tokens_per_micro_batch is None else data.tokens_per_micro_batch,
        "data.max_new_tokens": data.max_new_tokens,
        "data.max_train_examples": 1 if data.max_train_examples is None else data.max_train_examples,
        "data.max_eval_examples": 1 if data.max_eval_examples is None else data.max_eval_examples,
        "adapter.r": config.adapter.r,
        "profile.steps": config.profile.steps,
        "freezing.every": config.freezing.every,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise AFLoRAError(f"{name} must be at least 1, got {value}.")
    not_negative = {
        "run.save_every": config.run.save_every or 0,
        "data.hold_out": data.hold_out,
        "train.seed": train.seed,
        "train.learning_rate": train.learning_rate,
        "train.head_learning_rate": train.head_learning_rate,
        "train.weight_decay": train.weight_decay,
        "train.max_grad_norm": train.max_grad_norm,
        "freezing.initial_epochs": t_i,
        "freezing.final_epochs": t_f,
    }
    for name, number in not_negative.items():
        if not number >= 0:
            raise AFLoRAError(f"{name} must not be negative, got {number}.")
    _check_profile(config.profile)
    if train.seed >= 2**32:
        raise AFLoRAError(f"train.seed must be less than 2^32, as NumPy has it, got {train.seed}.")
    for option in ("dir", "resume", "keep_best"):
        if getattr(config.run, option) == "":
            raise AFLoRAError(f"run.{option} is empty: give a value, or leave the option away.")
    _check_dir(config.run.dir)
    if config.run.resume is not None and config.run.overwrite:
        raise AFLoRAError("run.resume goes on with the run in run.dir, run.overwrite replaces it: choose one.")
    if config.run.patience is not None and config.run.keep_best is None:
        raise AFLoRAError("run.patience waits for a better value of a metric: name it with run.keep_best.")
    if data.path is not None and data.task not in TASKS:
        raise AFLoRAError(f"data.path is for GLUE's tasks; data.task={data.task} does not read it.")
    if (data.train_file or data.validation_file) and data.task not in ("files", "sft"):
        raise AFLoRAError(f"data.train_file and data.validation_file need data.task=files or sft, not {data.task}.")
    if data.regression is not None and data.task != "files":
        raise AFLoRAError(f"data.regression is for data.task=files: what {data.task} learns is known.")
    if data.positive_label is not None and data.task != "files":
        raise AFLoRAError(f"data.positive_label is for data.task=files: {data.task} has its own, or none.")
    if data.task == "sft":
        for group, option in (("model", "train_new"), ("data", "pad_to_max_length")):
            if getattr(getattr(config, group), option):
                raise AFLoRAError(f"{group}.{option} is for classifiers: data.task=sft has no use for it.")
    for option in ("name", "hold_out", "system", "packing"):
        if getattr(data, option) and data.task != "sft":
            raise AFLoRAError(f"data.{option} is for language models: it needs data.task=sft, not {data.task}.")
    if not 0 <= train.warmup_ratio <= 1:
        raise AFLoRAError(f"train.warmup_ratio must lie in [0, 1], got {train.warmup_ratio}.")
    if config.method.name == "aflora" and config.method.options:
        raise AFLoRAError(
            f"method.options ({', '.join(config.method.options)}) is for PEFT's other methods: AFLoRA's options are "
            f"adapter.* and freezing.*."
        )
    if config.method.name == "full" and config.method.options:
        raise AFLoRAError("method.name=full has no options: it trains every parameter. Drop method.options.")
    adaptive = config.method.name == "aflora" and config.adapter.freezing == "adaptive"
    if adaptive and t_i + t_f > train.epochs:
        raise AFLoRAError(
            f"The freezing schedule does not fit: t_i + t_f = {t_i:g} + {t_f:g} epochs (freezing.initial_epochs + "
            f"freezing.final_epochs), but train.epochs = {train.epochs}. Train longer, or lower one of them."
        )
    check_trackers(config.run.trackers)


def _check_dir(path: str) -> None:
    if path.startswith("~") or "$" in path or "://" in path:
        raise AFLoRAError(f"run.dir={path} would be a folder of just that name. Write the path of a folder in full.")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # made, or refused, when all else is known
    except (OSError, ValueError) as error:  # the latter for a zero byte
        reason = getattr(error, "strerror", None) or error
        raise AFLoRAError(f"run.dir={path[:80]} cannot be a run's folder: {reason}. Name another.") from None


def _check_profile(profile: ProfileConfig) -> None:
    """What needs neither the number of ranks nor that of updates."""
    for option, first in (("ranks", 0), ("starts", 1)):
        given = getattr(profile, option)
        if given is None:
            continue
        if not given:
            raise AFLoRAError(f"profile.{option} is empty: name at least one, or leave the option away.")
        if min(given) < first:
            why = "; the update before a window warms the profiler up" if first else ""
            raise AFLoRAError(f"profile.{option} holds {min(given)}; the first there can be is {first}{why}.")
        if len(set(given)) < len(given):
            twice = next(number for number in given if given.count(number) > 1)
            raise AFLoRAError(f"profile.{option} holds {twice} twice: name it once.")
    starts = sorted(profile.starts or [])
    for one, other in pairwise(starts):
        if other - one <= profile.steps:
            raise AFLoRAError(
                f"profile.starts={starts}: the windows of {profile.steps} updates from {one} and from {other} overlap, "
                f"or leave none between them to warm the profiler up. Lower profile.steps, or move one."
            )
