"""What a study must not say, and which of its parts do not go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AFLoRAError
from ..training.command_line import refuse_code_of_others

if TYPE_CHECKING:
    from .description import Study

OURS = ("run.dir", "run.resume", "run.overwrite", "run.dry_run", "train.seed")  # what a study says of each run itself


def _lenders(study: Study, name: str | None) -> list[str]:
    """A method, that from which it takes rates, and so on, up to one that is no method or comes again."""
    found: list[str] = []
    while name in study.methods and name not in found:
        found.append(name)
        name = study.methods[name].rates_of
    return found


def _refuse_ours(options: Mapping[str, Any], where: str, known: Collection[str] = ("preset",)) -> None:
    if (odd := next((name for name in options if "." not in name and name not in known), None)) is not None:
        raise AFLoRAError(f"{where}: {odd!r} is no option of `aflora train` that a study takes: those are GROUP.KEY.")
    if (odd := next((name for name in options if name in OURS), None)) is not None:
        raise AFLoRAError(f"{where}: {odd} is the study's to say of each run: leave it out. Seeds stand in `seeds`.")
    for name, value in options.items():
        refuse_code_of_others(name, value, where)


def check(study: Study, path: Path) -> None:
    """Raise an AFLoRAError where parts of a study do not go together, or say what is not a study's to say."""
    if "metric" in study.settings:
        raise AFLoRAError(f"{path}: settings has a metric, which each task has of its own: say it there.")
    _refuse_ours(study.settings, f"{path}: settings")
    for task, options in study.tasks.items():
        _refuse_ours(options, f"{path}: tasks.{task}", ("preset", "metric"))
    for name, method in study.methods.items():
        _refuse_ours({**method.options, **method.sweep}, f"{path}: methods.{name}")
    _refuse_ours({} if study.sweep is None else study.sweep.options, f"{path}: sweep.options")
    for name, method in study.methods.items():
        for other in (method.rates_of, method.seconds_of):
            if other is not None and other not in study.methods:
                raise AFLoRAError(f"{path}: methods.{name} refers to {other!r}, which is no method of it.")
            if other is not None and (study.methods[other].seconds_of or name in _lenders(study, other)):
                raise AFLoRAError(f"{path}: methods.{name} refers to {other!r}, which takes from others itself.")
        if method.sweep and study.sweep is None:
            raise AFLoRAError(f"{path}: methods.{name} has values to try, and no section `sweep` says by which seeds.")
    for at, pair in enumerate(study.compare):
        for name in pair:
            if name not in study.methods:
                raise AFLoRAError(f"{path}: compare names {name!r}, which is no method of it.")
        if {*pair} in map(set, study.compare[:at]):
            raise AFLoRAError(f"{path}: compare names {' and '.join(pair)} twice, and p would be corrected for more.")
    for picture in study.pictures:
        if picture != "freeze_map":
            raise AFLoRAError(f"{path}: there is no picture {picture!r} beside the usual ones. There is: freeze_map.")
    refuse_seeds_of_both(study, str(path))
    if study.sweep is not None and not study.sweep.options.get("data.hold_out"):
        raise AFLoRAError(
            f"{path}: the sweep would choose by what is reported. Give sweep.options a data.hold_out: so many training "
            f"examples are held out, and looked at instead."
        )


def refuse_seeds_of_both(study: Study, where: str) -> None:
    """Raise an AFLoRAError where a seed is the sweep's and reported."""
    if study.sweep is not None and (both := {*study.sweep.seeds} & {*study.seeds}):
        raise AFLoRAError(f"{where}: seed {min(both)} is the sweep's and is reported, too. Take another.")
