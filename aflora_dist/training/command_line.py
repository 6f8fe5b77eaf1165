"""`aflora train`'s options as a command line gives them: defaults < preset < YAML files < command line."""

from __future__ import annotations

import re
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_dumper

from ..errors import AFLoRAError
from ..options import Config
from ..untrusted import refuse_deep_yaml
from ..watch.trackers import TENSORBOARD, check_trackers
from .config_file import Entries, as_yaml, look_through, refuse_misread
from .help import help_text
from .presets import PRESETS

_GROUPS = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}
OPTIONS: dict[str, Any] = {  # name -> type
    "preset": str | None,
    **{
        f"{group}.{name}": hint
        for group, kind in _GROUPS.items()
        for name, hint in get_type_hints(kind).items()
        if get_origin(hint) is not ClassVar
    },
}
_FREE = tuple(name for name, hint in OPTIONS.items() if "dict[" in str(hint))  # whose names are of others
_NUMBERS = re.compile(r"int|float|list|Any|dict")  # types of which a value is what YAML makes of it
# Options that may stand without their group and value: the option, and the value that is meant.
_SHORT = {
    "--profile": ("profile.enabled", "true"),
    "--dry_run": ("run.dry_run", "true"),
    "--dry-run": ("run.dry_run", "true"),
    "--resume": ("run.resume", "last"),
}
# What `accelerate launch` takes, or other launchers add, and people write behind the module.
_LAUNCHER = re.compile(
    r"--(local[_-]rank|num_processes|num_machines|mixed_precision|config_file|deepspeed|use_\w+|main_\w+"
    r"|zero_stage|multi_gpu|machine_rank|cpu)\b"
)
# What transformers' Trainer calls its options, where the names are far from ours.
_OF_TRAINER = {
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size, which is of all ranks together",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler_kwargs": "train.schedule_options",
    "optim": "train.optimizer",
    "optim_args": "train.optimizer_options",
    "label_smoothing_factor": "train.label_smoothing",
    "eval_steps": "run.eval_every",
    "save_steps": "run.save_every",
    "logging_steps": "run.log_every",
    "save_total": "run.keep",
    "save_total_limit": "run.keep",
    "load_best_model_at_end": "run.keep_best",
    "metric_for_best_model": "run.keep_best",
    "output_dir": "run.dir",
    "resume_from_checkpoint": "run.resume",
    "report_to": "run.trackers",
    "model_name_or_path": "model.name",
    "dataset_name": "data.name",
    "dataset_config": "data.subset",
    "dataset_config_name": "data.subset",
    "max_seq_length": "data.max_length",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
}

set_dumper("aflora", as_yaml)


def parse(arguments: list[str]) -> tuple[Config, str]:
    """The configuration that a command line asks for, and the same as YAML with everything resolved.

    Raises:
        AFLoRAError: An unknown option, preset or value; the message names it.
        SystemExit: After printing the help that was asked for.
    """
    for at, word in enumerate(arguments):
        if word in ("-h", "--help"):
            asked = next(iter(arguments[at + 1 :]), "")
            print(help_text(_parser(), _GROUPS, asked if asked in {*_GROUPS, "all"} else ""))
            raise SystemExit(0)
    files, said = split_line(arguments)
    nullable = {name: type(None) in get_args(hint) for name, hint in OPTIONS.items()}
    entries: Entries = {}
    for path in files:
        entries |= look_through(path, _GROUPS, nullable)
    preset = _preset(said["preset"] if "preset" in said else entries["preset"].value if "preset" in entries else None)
    parser = _parser()
    parser.set_defaults(preset)
    try:
        namespace = parser.parse_args(
            [*(f"--config={path}" for path in files), *(f"--{name}={value}" for name, value in said.items())]
        )
    except Exception as error:  # jsonargparse raises many kinds
        raise AFLoRAError(_readable(error, said, entries)) from None
    namespace.pop("config", None)  # the files it came from
    _restore_texts(namespace, said, entries)
    _rename_tensorboard(namespace)
    config = Config(**parser.instantiate(namespace).as_dict())
    check_trackers(config.run.trackers)
    _refuse_code(config, said, entries)
    _refuse_no_model(config, named="model.name" in {*preset, *entries, *said})
    if config.method.name != "aflora":
        _refuse_options_without_a_user(config, parser.get_defaults())
    # Whoever names what this leaves behind wants the same training, and no other one deleted or taken up for it.
    namespace["run.overwrite"], namespace["run.resume"] = False, None
    return config, parser.dump(namespace, format="aflora", skip_unset=False)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="aflora train",
        usage="%(prog)s [CONFIG.yaml] [--preset NAME] [--GROUP.KEY VALUE ...]",
        description="Fine-tune a sequence classifier or a language model with AFLoRA. Start it with `accelerate "
        "launch -m aflora_dist.training.run ...` to use several processes or DeepSpeed.",
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument("--config", action="config", help="YAML file; also as first argument.")
    parser.add_class_arguments(Config)
    return parser


def split_line(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """YAML files, and values by option, with shorthands and lists without brackets written out.

    Raises an AFLoRAError for an unknown option, or one without a value.
    """
    files: list[str] = []
    said: dict[str, str] = {}
    rest = [*arguments]
    if rest and not rest[0].startswith("-"):
        files.append(rest.pop(0))
    while rest:
        option, sign, value = rest.pop(0).partition("=")
        name, meant = _SHORT.get(option, (option.removeprefix("--"), ""))
        known = name in {*OPTIONS, *_GROUPS, "config"} or name.startswith(tuple(f"{free}." for free in _FREE))
        if not option.startswith("--") or not known:
            raise AFLoRAError(f"There is no option {option}. {_instead(option)}")
        follows = bool(rest) and not rest[0].startswith("--")
        if not sign and follows and (meant != "true" or rest[0] in ("true", "false")):
            sign, value = "=", rest.pop(0)
        if not sign and not meant:
            raise AFLoRAError(f"{option} has no value: give one.")
        value = value or meant
        if name == "config":
            files.append(value)
        elif name in _GROUPS:
            rest = [f"--{name}.{key}={inner}" for key, inner in _of_group(name, value)] + rest
        else:
            said.pop(name, None)  # later wins, also over what stands between
            hint = str(OPTIONS[name] if name in OPTIONS else get_args(OPTIONS[_names_of(name)])[1])
            said[name] = _bracketed(value) if "list[" in hint else value
            if _NUMBERS.search(hint):
                _node(name, said[name])
    return files, said


def said_options(arguments: list[str]) -> set[str]:
    """The options that a command line without a first file says, as GROUP.KEY, however it does; "config" for a file.

    Raises:
        AFLoRAError: As `split_line`.
    """
    files, said = split_line(["", *arguments])
    free = (next((name for name in _FREE if option.startswith(f"{name}.")), option) for option in said)
    return ({"config"} if files[1:] else set()).union(free)


def _names_of(option: str) -> str:
    """Which option holds the name in `method.options.r`, a part of one.

    Raises an AFLoRAError if that has dots of its own, which jsonargparse takes for levels.
    """
    group, holds, name = option.split(".", 2)
    if "." in name:
        raise AFLoRAError(f"--{option}: a name with a dot is given as in --{group}.{holds} '{{\"{name}\": VALUE}}'.")
    return f"{group}.{holds}"


def _of_group(name: str, value: str) -> list[tuple[str, str]]:
    """The options in `{"epochs": 3}`, and what is written behind each."""
    node = _node(name, value)
    if not isinstance(node, yaml.MappingNode):
        given = value[:80] or "empty"
        raise AFLoRAError(f"{name} must hold options, as in --{name} '{{NAME: VALUE, ...}}', not {given}.")
    return [
        (key.value, v.value if isinstance(v, yaml.ScalarNode) else value[v.start_mark.index : v.end_mark.index])
        for key, v in node.value
    ]


def _node(name: str, value: str) -> yaml.Node | None:
    """A value as YAML; None where it is none, of which jsonargparse complains.

    Raises an AFLoRAError where YAML would read something in it that is hardly meant.
    """
    try:
        refuse_deep_yaml(value, yaml.SafeLoader)
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    try:
        refuse_misread(node, name)
    except yaml.MarkedYAMLError as error:
        raise AFLoRAError(f"{error.problem}.") from None
    return node


def _bracketed(value: str) -> str:
    """`wandb,mlflow` as `[wandb,mlflow]`."""
    return value if value[:1] in ("[", "{") or value in ("", "null") else f"[{value}]"


def _preset(name: str | None) -> dict[str, Any]:
    if name in (None, "null"):
        return {}
    if name not in PRESETS:
        raise AFLoRAError(f"There is no preset {name!r}. Presets: {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]


def _restore_texts(namespace: Any, said: dict[str, str], entries: Entries) -> None:
    """Texts in which YAML reads nothing: "# Role: tutor" is a comment to it, and a quoted 'null' is null."""
    written = {name: None if entry.null else entry.value for name, entry in entries.items()}
    null = ("", "null", "Null", "NULL", "~")
    written |= {name: None if text.strip() in null else text for name, text in said.items()}
    for name, text in written.items():
        if OPTIONS.get(name) == str | None and namespace[name] is None:
            namespace[name] = text


def _rename_tensorboard(namespace: Any) -> None:
    """run.tensorboard of earlier releases' files as run.trackers has it."""
    if (wanted := namespace["run.tensorboard"]) is not None:
        others = [name for name in namespace["run.trackers"] if name != TENSORBOARD]
        namespace["run.trackers"] = [TENSORBOARD, *others] if wanted else others
        namespace["run.tensorboard"] = None


def _refuse_code(config: Config, said: dict[str, str], entries: Entries) -> None:
    """Raise where a file, and not the command line itself, would have code run that comes with a model or a kernel."""
    asks = {f"model.{option}": getattr(config.model, option) for option in ("trust_remote_code", "attn_implementation")}
    for option, value in asks.items():
        if option not in said:
            refuse_code_of_others(option, value, entries[option].place if option in entries else "A file")


def refuse_code_of_others(option: str, value: Any, where: str) -> None:
    """Raise an AFLoRAError if an option that a file gives would have code of others run."""
    told = str(value).lower()
    if (option == "model.trust_remote_code" and told not in ("false", "none")) or (
        option == "model.attn_implementation" and "/" in told  # of the hub
    ):
        raise AFLoRAError(
            f"{where}: only the command line can have code of others run. Read that code, then add --{option} "
            f"{'true' if value is True else value}."
        )


def _refuse_no_model(config: Config, *, named: bool) -> None:
    """Raise where own data would be trained on with the demo's model because none was named."""
    task, name = config.data.task, config.data.name
    if not named and task != "demo" and (task, name) != ("sft", "demo"):
        raise AFLoRAError(
            f"data.task={task} needs a model: name a hub id or a folder with --model.name, or take the demo's small "
            f"one with --model.name demo."
        )


def _refuse_options_without_a_user(config: Config, defaults: Any) -> None:
    """Raise for what was asked of AFLoRA, or of freezing, where neither is; a preset says it to whom it may concern."""
    unread = ["adapter"] if config.freezing.enabled else ["adapter", "freezing"]
    for group in unread:
        for option, value in asdict(getattr(config, group)).items():
            if value != defaults[group][option] and option != "enabled":
                instead = "Options of other methods are given as --method.options '{\"NAME\": VALUE, ...}'."
                if group == "freezing":
                    instead = "With --freezing.enabled true this method freezes, too."
                raise AFLoRAError(
                    f"{group}.{option}={value} is for AFLoRA, and method.name={config.method.name}. {instead}"
                )


def _readable(error: Exception, said: dict[str, str], entries: Entries) -> str:
    """What jsonargparse complains of, in a line: where, which option, and what it must be."""
    name = next(iter(re.findall(r'^Parser key "([\w.]+)"', str(error))), "")
    if name in OPTIONS and name in {**said, **entries}:
        where, given = ("", said[name]) if name in said else (f"{entries[name].place}: ", entries[name].value)
        return f"{where}{name} must be {_kind(OPTIONS[name])}, not {given[:80] or 'empty'}."
    return " ".join(str(error).split()[:50])


def _kind(hint: Any) -> str:
    """A type in words.

    >>> _kind(list[int] | None), _kind(Literal["cubic", "quadratic"])
    ('a list of whole numbers, as in [1, 2], or null', 'one of cubic, quadratic')
    """
    if type(None) in get_args(hint):
        return f"{_kind(get_args(hint)[0])}, or null"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "text (put numbers, and yes and no, into quotes)",
        list[int]: "a list of whole numbers, as in [1, 2]",
        list[str]: "a list of texts, as in [a, b]",
        dict[str, str]: 'names and names, as in {"prompt": "question"}',
        dict[str, float]: 'names and numbers, as in {"more.jsonl": 0.5}',
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
    if last in _OF_TRAINER:
        return f"Here it is --{_OF_TRAINER[last]}."
    fields = {name: name.rpartition(".")[2] for name in OPTIONS}
    same = [name for name, field in fields.items() if last in (field, "".join(word[0] for word in field.split("_")))]
    close = same or get_close_matches(unknown.lstrip("-"), [*OPTIONS], n=1, cutoff=0.75)
    return f"Did you mean --{' or --'.join(close)}?" if close else "See --help for all options."
