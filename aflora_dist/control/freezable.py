"""What may freeze: as the model's adapter says, or a user by name, regular expression or function."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol, runtime_checkable

from peft import PromptLearningConfig
from torch import nn

from ..adapter.freezable import (
    aliases_of,
    as_expression,
    frozen_before,
    none_chosen,
    refuse_all,
    refuse_decided,
    refuse_half,
)
from ..engines import Engine
from ..errors import AFLoRAError, UnsupportedEngineError
from ..freezing import FreezingConfig
from ..names import named_parameters


@runtime_checkable
class Freezable(Protocol):
    """Who adapts a model: says which of its parameters may freeze, and is told which have."""

    def freezable(self) -> Collection[str]:
        """Names of parameters, as `model.named_parameters()` has them. Who does not train is left out."""

    def have_frozen(self, names: Collection[str]) -> None:
        """All that have frozen so far; the others train. Called after each freeze and each restored checkpoint."""


Choice = Freezable | Iterable[str] | str | re.Pattern[str] | Callable[[str, nn.Parameter], bool] | None


def checked_choice(choice: Any) -> Choice:
    """What a user says may freeze, to be looked at as often as there are trainings: a generator's names are kept.

    Raises:
        AFLoRAError: It is none of the four kinds.
    """
    if choice is None or isinstance(choice, str | re.Pattern | Freezable) or callable(choice):
        return choice
    names = tuple(choice) if isinstance(choice, Iterable) else (choice,)
    if strange := [name for name in names if not isinstance(name, str)]:
        raise AFLoRAError(
            f"freezable takes names of parameters, a regular expression over them, a function of name and parameter, "
            f"or an object with the two methods of Freezable; it got {strange[0]!r:.80}."
        )
    return names


class Chosen:
    """What a user has chosen, checked; the adapter hears of it all the same.

    What an earlier training of the model froze may be chosen again, and stays as it is.

    Raises:
        AFLoRAError: There is no such parameter, it does not train, or only one name of a tied weight is chosen.
    """

    def __init__(
        self, choice: Iterable[str] | str | re.Pattern[str] | Callable[[str, nn.Parameter], bool], engine: Engine
    ):
        self._engine, self._before = engine, frozen_before(engine.model)
        self._aliases = aliases_of(engine.model)
        chosen = self._matching(choice) if isinstance(choice, str | re.Pattern) or callable(choice) else set(choice)
        if not chosen:
            none_chosen(choice, engine.trainable)
        self._names = [name for name in engine.trainable if chosen & set(self._aliases[name])]
        self._check(chosen)

    def _matching(self, choice: str | re.Pattern[str] | Callable[[str, nn.Parameter], bool]) -> set[str]:
        """Of the parameters that train, or did before they froze, by every name that they have."""
        names = [*self._engine.trainable, *self._before]
        known = [(name, alias) for name in names for alias in self._aliases[name]]
        if isinstance(choice, str | re.Pattern):
            pattern = as_expression(choice)
            return {alias for _, alias in known if pattern.fullmatch(alias)}
        return {alias for name, alias in known if choice(alias, self._engine.parameters[name])}

    def _check(self, chosen: Collection[str]) -> None:
        first = {alias: name for name, aliases in self._aliases.items() for alias in aliases}
        for name in sorted(chosen):
            if name not in first:
                raise AFLoRAError(
                    f"freezable names {name!r}, which is no parameter of the model. Names are those of "
                    f"model.named_parameters() before accelerator.prepare(), such as {next(iter(self._aliases))!r}."
                )
            if first[name] in self._before:
                continue
            if first[name] not in self._names:
                raise AFLoRAError(
                    f"freezable names {name!r}, which does not train: it has no gradient, or the optimizer was not "
                    f"given it."
                )
            refuse_half(self._aliases[first[name]], chosen)

    def freezable(self) -> list[str]:
        return self._names

    def have_frozen(self, names: Collection[str]) -> None:
        """The adapter is told."""


def names_of(source: Freezable, engine: Engine, config: FreezingConfig) -> list[str]:
    """The parameters that will freeze, as the engine calls them and in its order.

    None if the source names none: it is left as it is, and only steps are counted.

    Raises:
        AFLoRAError: Nothing of it trains, all that trains would freeze, or an adapter decides over it itself.
        UnsupportedEngineError: PEFT could not save what is learned on this engine.
    """
    _refuse_prompts(engine)
    wanted = set(source.freezable())
    ids = {id(p) for n, p in named_parameters(engine.model, remove_duplicate=False).items() if n in wanted}
    trained = set(engine.trainable)
    found = [name for name, p in engine.parameters.items() if id(p) in ids and name in trained and engine.numel(name)]
    if wanted and not found:
        raise AFLoRAError(
            "AdaptiveFreezing has nothing to freeze: of what may freeze, such as "
            f"{sorted(wanted)[0]}, nothing trains and is in the optimizer. Check the parameters that the optimizer was "
            "given, AFLoRAConfig(freezable=..., freezing='adaptive') of an AFLoRA adapter, and AdaptiveFreezing(..., "
            "freezable=...)."
        )
    refuse_all(found, trained, config)
    refuse_decided(engine.model, {name: engine.parameters[name] for name in found})
    return found


def _refuse_prompts(engine: Engine) -> None:
    """Raise where PEFT could not save what is learned: it computes it by a forward pass on one rank alone."""
    if not engine.sharded:
        return
    for tuning in getattr(engine.model, "peft_config", {}).values():
        if isinstance(tuning, PromptLearningConfig):
            raise UnsupportedEngineError(
                f"{type(tuning).__name__} learns tokens that PEFT computes from whole parameters when it saves them, "
                f"and {engine.kind} keeps a part of each on every rank. Use one process, launch/ddp.yaml or "
                f"launch/zero2.yaml."
            )
