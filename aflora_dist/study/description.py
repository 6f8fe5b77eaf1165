"""What a study's YAML file says: tasks, methods, seeds, what is searched and what is compared. Runs nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import AFLoRAError
from ..training.config_file import refuse_misread
from ..untrusted import refuse_deep_yaml
from .refusals import check, refuse_seeds_of_both

SHIPPED = Path(__file__).with_name("shipped")
_LONGEST = 80  # characters of the names of tables
_OF_METHOD = ("sweep", "rates_of", "seconds_of", "title")


@dataclass(frozen=True)
class Variant:
    """A method of a study: a row of its table.

    Attributes:
        options: Of `aflora train`, by their names.
        sweep: Option -> values to try, searched one option after the other. Where the best value lies at an end, more
            are tried beyond it.
        rates_of: Takes what was chosen for that method, before it searches further itself.
        seconds_of: Trains on as many examples as it sees in the seconds that that method takes.
    """

    options: dict[str, Any]
    sweep: dict[str, list[Any]]
    rates_of: str | None = None
    seconds_of: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Sweep:
    """How rates are chosen: by runs with these seeds, evaluated on these data, never on what is reported.

    Attributes:
        options: Of `aflora train`, for these runs alone; at least data.hold_out, so that they are evaluated on training
            examples that were held out.
        metric: As result.json names it; the task's if not given.
        wider: How many values are tried at most beyond an end.
    """

    seeds: list[int]
    options: dict[str, Any]
    metric: str | None = None
    wider: int = 2


@dataclass(frozen=True)
class Study:
    """A study, as its file describes it.

    Attributes:
        settings: Options of `aflora train` that all runs have.
        tasks: Label -> options; "metric" among them names what of result.json is reported.
        compare: (method, with which it is compared).
        paper: Method -> task -> what the paper reports, in points.
        differs: How the setting differs from the paper's, for the table.
        pictures: Beside those that every study has: freeze_map (Fig. 5).
        part: Which part or setting of the study this is, for the names of its tables: "small", "rte", ...
    """

    name: str
    title: str
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, Variant]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    compare: list[tuple[str, str]] = field(default_factory=list)
    sweep: Sweep | None = None
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    differs: str = ""
    pictures: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    part: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Of its tables: another part's do not overwrite them."""
        label = "_".join([self.name, *self.part]).replace("/", "-")
        if len(label) <= _LONGEST:
            return label
        return f"{label[:_LONGEST]}_{hashlib.sha256(label.encode()).hexdigest()[:8]}"

    def restricted(self, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Study:
        """The part of it with these tasks, methods and seeds; all where none is named.

        Raises:
            AFLoRAError: It has no such task or method; a seed is none, or the sweep's.
        """
        for named, there, what in ((tasks, self.tasks, "task"), (methods, self.methods, "method")):
            for name in named:
                if name not in there:
                    raise AFLoRAError(f"{self.name} has no {what} {name!r}: it has {', '.join(there)}.")
        part = replace(
            self,
            tasks={name: self.tasks[name] for name in tasks or self.tasks},
            seeds=_seeds([*(seeds or self.seeds)], "--seeds"),
            only=list(methods or self.reported),
            compare=[pair for pair in self.compare if not methods or {*pair} <= {*methods}],
            part=(*self.part, *tasks, *methods, *(f"seed{seed}" for seed in seeds)),
        )
        refuse_seeds_of_both(part, self.name)
        return part

    @property
    def reported(self) -> list[str]:
        """The methods that its tables show; others may be there for what is chosen for them."""
        return [name for name in self.methods if not self.only or name in self.only]


def read_study(path: Path, small: bool = False) -> Study:
    """The study that a file describes.

    Args:
        small: With what its section `small` says instead.

    Raises:
        AFLoRAError: It cannot be read, or says what no study has.
    """
    said = _document(path)
    if (other := said.pop("like", None)) is not None:  # another file beside it says what this one does not
        common = _document(beside := path.parent / f"{other}.yaml")
        smaller = [_mapping(of.get("small"), f"{file}: small") for of, file in ((common, beside), (said, path))]
        said = {**common, **said, "small": {**smaller[0], **smaller[1]}}
    instead = _mapping(said.pop("small", {}), f"{path}: small")
    if small and not instead:
        raise AFLoRAError(f"{path} has no section `small`: leave --small away.")
    if small:
        said = _merged(said, instead, path)
    known = {option.name for option in fields(Study)} - {"name", "only", "part"}
    _refuse_unknown(said, known, str(path))
    for needed in ("tasks", "methods", "seeds"):
        if not said.get(needed):
            raise AFLoRAError(f"{path} names no {needed}.")
    tasks = {name: _mapping(options, f"{path}: tasks.{name}") for name, options in _named(said, "tasks", path)}
    methods = {name: _variant(name, options, path) for name, options in _named(said, "methods", path)}
    study = Study(
        **{
            **said,
            "name": path.stem,
            "title": str(said.get("title") or path.stem),
            "tasks": tasks,
            "methods": methods,
            "settings": _mapping(said.get("settings"), f"{path}: settings"),
            "differs": str(said.get("differs") or ""),
            "seeds": _seeds(said["seeds"], f"{path}: seeds"),
            "compare": [_pair(one, path) for one in _listed(said.get("compare"), f"{path}: compare")],
            "sweep": _sweep(said.get("sweep"), path),
            "paper": {name: _numbers_in(row, f"{path}: paper.{name}") for name, row in _named(said, "paper", path)},
            "pictures": _listed(said.get("pictures"), f"{path}: pictures"),
            "part": ("small",) if small else (),
        }
    )
    check(study, path)
    return study


class _Loader(yaml.SafeLoader):
    """YAML of what JSON has: a date, yes, no, on and off are texts, and so are keys, as they are written."""

    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if str(tag).rpartition(":")[2] not in ("binary", "omap", "pairs", "set", "timestamp")
    } | {"tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_str}

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in yaml's own classes)
        first: [(tag, found) for tag, found in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node

    def get_single_node(self) -> Any:
        refuse_misread(node := super().get_single_node())
        return node


def _document(path: Path) -> dict[str, Any]:
    if path.is_fifo():  # it would be waited for
        raise AFLoRAError(f"{path}, which is to describe a study, is a pipe. Name a file.")
    try:
        text = path.read_text(encoding="utf-8")
        refuse_deep_yaml(text, yaml.SafeLoader)
        said = yaml.load(text, _Loader)
    except OSError as error:
        raise AFLoRAError(f"{path}, which is to describe a study, could not be read: {error.strerror}.") from None
    except Exception as error:  # PyYAML lets through whatever its constructors raise
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        told = " ".join(str(getattr(error, "problem", None) or error).split())
        raise AFLoRAError(f"{path}{where}: this is not YAML that describes a study: {told[:200]}.") from None
    if not isinstance(said, dict):
        raise AFLoRAError(f"{path} must hold tasks, methods and seeds, each with its values below it.")
    return said


def shipped() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("[!_]*.yaml"))}


def _merged(said: dict[str, Any], instead: dict[str, Any], path: Path) -> dict[str, Any]:
    """`settings`, and each of `methods`, are merged by name; whatever else is replaced."""

    def merged(ours: Any, theirs: Any, where: str) -> dict[str, Any]:
        return {**_mapping(ours, f"{path}: {where}"), **_mapping(theirs, f"{path}: small.{where}")}

    ours = _mapping(said.get("methods"), f"{path}: methods")
    theirs = _mapping(instead.get("methods"), f"{path}: small.methods")
    methods = {name: merged(ours.get(name), theirs.get(name), f"methods.{name}") for name in {**ours, **theirs}}
    return {
        **said,
        **instead,
        "methods": methods,
        "settings": merged(said.get("settings"), instead.get("settings"), "settings"),
    }


def _named(said: dict[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    named = _mapping(said.get(key), f"{path}: {key}")
    if (odd := next((name for name in named if not name.isprintable() or not name.strip()), None)) is not None:
        raise AFLoRAError(f"{path}: {key} has the name {odd!r}, which is no line of a table.")
    return [*named.items()]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AFLoRAError(f"{where} must hold names with values, not {value!r}.")
    return {str(name): inner for name, inner in value.items()}


def _listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise AFLoRAError(f"{where} must hold a list, as [0, 1, 2], not {value!r}.")
    return value or []


def _seeds(value: Any, where: str) -> list[int]:
    seeds = _listed(value, where)
    if not seeds or any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
        raise AFLoRAError(f"{where} must list whole numbers from 0 on, as [0, 1, 2], not {value!r}.")
    return [*dict.fromkeys(seeds)]


def _pair(value: Any, path: Path) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or str(value[0]) == str(value[1]):
        raise AFLoRAError(f"{path}: compare must list pairs of methods, as [[plain, other]]; {value!r} is none.")
    return str(value[0]), str(value[1])


def _numbers_in(value: Any, where: str) -> dict[str, float]:
    row = _mapping(value, where)
    if (odd := next((name for name in row if not isinstance(row[name], int | float)), None)) is not None:
        raise AFLoRAError(f"{where}.{odd} must be a number, not {row[odd]!r}.")
    return row


def _refuse_unknown(said: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in said:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(sorted(known))}."
            raise AFLoRAError(f"{where}: there is no {name!r}. {hint}")


def _variant(name: str, said: Any, path: Path) -> Variant:
    where = f"{path}: methods.{name}"
    options = _mapping(said, where)
    plain = {key: value for key, value in options.items() if "." in key or key == "preset"}
    own = {key: value for key, value in options.items() if key not in plain}
    _refuse_unknown(own, {*_OF_METHOD}, where)
    sweep = _mapping(own.get("sweep"), f"{where}.sweep")
    for option, values in sweep.items():
        if not isinstance(values, list) or len(values) < 2:
            raise AFLoRAError(f"{where}.sweep.{option} must list two values or more, not {values!r}.")
    others = {key: None if own.get(key) is None else str(own[key]) for key in ("rates_of", "seconds_of", "title")}
    return Variant(plain, sweep, **others)


def _sweep(said: Any, path: Path) -> Sweep | None:
    if said is None:
        return None
    _refuse_unknown(_mapping(said, f"{path}: sweep"), {option.name for option in fields(Sweep)}, f"{path}: sweep")
    wider, metric = said.get("wider", 2), said.get("metric")
    if not isinstance(wider, int) or wider < 0:
        raise AFLoRAError(f"{path}: sweep.wider is how many values are tried beyond an end, not {wider!r}.")
    options = _mapping(said.get("options"), f"{path}: sweep.options")
    return Sweep(
        _seeds(said.get("seeds"), f"{path}: sweep.seeds"), options, None if metric is None else str(metric), wider
    )
