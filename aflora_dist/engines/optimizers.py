"""What freezing needs of an optimizer, found out by trying one like it on a few small tensors.

A list of names would be wrong twice: for subclasses, and for the next release.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..compat.torch import without_step_hooks
from ..errors import UnsupportedEngineError, one_line

_HEARING: list[Any] = []  # the one hook of ours that all optimizers have
# Whom to tell of optimizers, how, and of which they have been told.
_TOLD: weakref.WeakKeyDictionary[Any, tuple[Callable[[Any, Any], None], weakref.WeakSet[Any]]]
_TOLD = weakref.WeakKeyDictionary()
_SHAPE = (64, 72)  # bitsandbytes keeps 8 bits from 4,096 elements on
_INSTEAD = (
    "Use an optimizer that treats every element by itself and keeps a number per element, such as torch.optim.AdamW."
)


@dataclass(frozen=True)
class OptimizerTraits:
    """How an optimizer keeps the state of one parameter.

    Attributes:
        moments: Keys that hold a number for each element (Adam's exp_avg, exp_avg_sq).
        scalars: Keys that hold one number (Adam's step), with an example of its type.
        group_state: Options of a param group that the optimizer itself changes.
    """

    moments: tuple[str, ...]
    scalars: Mapping[str, Any]
    group_state: tuple[str, ...]

    def scalar(self, key: str, number: Any, device: torch.device) -> Any:
        """A number out of a snapshot as this optimizer keeps it; `device`: where its parameter lies."""
        example = self.scalars[key]
        if isinstance(example, Tensor):
            beside = example.device.type == device.type
            return torch.full_like(example, number, device=device if beside else example.device)
        return number if number is None or example is None else type(example)(number)


def name_of_class(optimizer: Any) -> str:
    """What messages call it: other packages have classes of the names of torch's."""
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package in ("torch", "builtins") else f"{package}.{kind.__name__}"


def inner_optimizer(optimizer: Any) -> Any:
    """What accelerate has wrapped: a torch optimizer, or DeepSpeed's around one; else an UnsupportedEngineError.

    An optimizer that itself wraps another one stays whole: it has state of its own.
    """
    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) and "deepspeed" not in type(inner).__module__:
        raise UnsupportedEngineError(
            f"AdaptiveFreezing(accelerator, model, optimizer, ...) got {name_of_class(optimizer)} as its optimizer. "
            f"Pass the optimizer that accelerator.prepare() returned."
        )
    return inner


def release(parameter: nn.Parameter) -> None:
    """Stop a parameter's training: an optimizer looks at .grad, not at requires_grad."""
    parameter.requires_grad_(False)
    parameter.grad = None


def plain(value: Any) -> Any:
    """A scalar of an optimizer's state as JSON can hold it."""
    return value.item() if isinstance(value, Tensor) else value


def examine(optimizer: Optimizer, device: torch.device) -> OptimizerTraits:
    """Try an optimizer like this one on small tensors: it must not notice that others leave it, nor that it is resumed.

    Args:
        device: Of the tensors that the optimizer updates. The trial is in float32, where what is exact can be told
            from what is not.

    Raises:
        UnsupportedEngineError: Dropping parameters from it, or going on from its state by name, is not exact.
    """
    name = name_of_class(optimizer)
    if callable(getattr(type(optimizer), "eval", None)):
        raise UnsupportedEngineError(
            f"{name} holds other weights in training than in evaluation (it has an eval()), so a matrix that freezes "
            f"would keep the wrong ones. {_INSTEAD}"
        )
    try:
        moments: dict[str, None] = {}
        scalars: dict[str, Any] = {}
        group_state: dict[str, None] = {}
        for options in _distinct(optimizer):
            traits = _try(optimizer, options, device)
            moments |= dict.fromkeys(traits.moments)
            scalars |= traits.scalars
            group_state |= dict.fromkeys(traits.group_state)
        return OptimizerTraits(tuple(moments), scalars, tuple(group_state))
    except UnsupportedEngineError:
        raise
    except Exception as error:  # whatever a strange optimizer does on tensors that are not its own
        raise UnsupportedEngineError(
            f"{name} cannot be tried out on small tensors ({type(error).__name__}: {error}), so it is not known "
            f"whether freezing with it is exact. {_INSTEAD}"
        ) from error


def check_updates(optimizer: Optimizer, like: Tensor, what: str) -> None:
    """Raise an UnsupportedEngineError unless an optimizer like this one updates tensors like that; `what` they are."""
    parameter = nn.Parameter(torch.zeros_like(like))
    parameter.grad = torch.ones_like(parameter)
    try:
        _like(optimizer, _distinct(optimizer)[0], [parameter]).step()
    except Exception as error:  # whatever a kernel says of what it does not know
        raise UnsupportedEngineError(
            f"{name_of_class(optimizer)} does not update {what} ({type(error).__name__}: {one_line(error)}). Use one "
            f"that does, such as torch.optim.AdamW."
        ) from error


class _Trial:
    """Small tensors, and optimizers like the given one to update them."""

    def __init__(self, optimizer: Optimizer, given: Mapping[str, Any], device: torch.device) -> None:
        self.optimizer, self.given, self.device = optimizer, given, device
        generator = torch.Generator().manual_seed(0)
        self.start = torch.randn(_SHAPE, generator=generator)
        self.gradients = [torch.randn(_SHAPE, generator=generator) for _ in range(3)]

    def parameter(self, values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(self.device).clone())

    def optimizer_of(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        return _like(self.optimizer, self.given, parameters)

    def step(self, made: Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(self.device).clone()
        made.step()


def _try(optimizer: Optimizer, given: Mapping[str, Any], device: torch.device) -> OptimizerTraits:
    name, trial = name_of_class(optimizer), _Trial(optimizer, given, device)
    expected, options = _undisturbed(trial)
    limit = 1e-3 * (expected - trial.start.to(device)).abs().max().item()
    if not limit > 0:
        raise UnsupportedEngineError(
            f"Three updates of {name} on trial changed nothing, so nothing is known. {_INSTEAD}"
        )
    kept, resumed, traits = _left_and_resumed(trial, options)
    for found, complaint in (
        (kept, "its updates of one parameter change when another one leaves it"),
        (resumed, "it does not go on as before from its state by name"),
        (_in_pieces(trial), "its update of an element depends on other elements"),
    ):
        if not (found.detach() - expected).abs().max().item() <= limit:
            raise UnsupportedEngineError(f"Freezing with {name} would not be exact: {complaint}. {_INSTEAD}")
    return traits


def _undisturbed(trial: _Trial) -> tuple[Tensor, dict[str, Any]]:
    """A parameter beside a companion after three updates, and the options of the group before them."""
    kept, companion = trial.parameter(trial.start), trial.parameter(-trial.start)
    made = trial.optimizer_of([kept, companion])
    options = _options(made)
    for gradient in trial.gradients:
        trial.step(made, [kept, companion], [gradient, gradient])
    return kept.detach().clone(), options


def _left_and_resumed(trial: _Trial, options: Mapping[str, Any]) -> tuple[Tensor, Tensor, OptimizerTraits]:
    """The parameter if its companion leaves after two updates; another one that goes on from its state by then."""
    kept, companion = trial.parameter(trial.start), trial.parameter(-trial.start)
    left = trial.optimizer_of([kept, companion])
    for gradient in trial.gradients[:2]:
        trial.step(left, [kept, companion], [gradient, gradient])
    traits = _traits(name_of_class(trial.optimizer), left, kept, options)
    left.param_groups[0]["params"] = [kept]
    left.state.pop(companion, None)
    companion.grad = None
    successor = trial.parameter(kept.detach())
    resumed = trial.optimizer_of([successor])
    state = left.state.get(kept, {})
    resumed.state[successor] = {key: state[key].clone() for key in traits.moments} | {
        key: traits.scalar(key, plain(state[key]), trial.device) for key in traits.scalars
    }
    for key in traits.group_state:
        resumed.param_groups[0][key] = copy.deepcopy(left.param_groups[0][key])
    trial.step(left, [kept], trial.gradients[2:])
    trial.step(resumed, [successor], trial.gradients[2:])
    return kept, successor, traits


def _in_pieces(trial: _Trial) -> Tensor:
    """The parameter after three updates of its pieces, as a sharding engine holds it."""
    cuts = [5, 1000, trial.start.numel() - 1005]
    parts = [trial.parameter(part) for part in trial.start.flatten().split(cuts)]
    made = trial.optimizer_of(parts)
    for gradient in trial.gradients:
        trial.step(made, parts, gradient.flatten().split(cuts))
    return torch.cat([part.detach() for part in parts]).view(_SHAPE)


def _traits(name: str, trial: Optimizer, parameter: nn.Parameter, options: Mapping[str, Any]) -> OptimizerTraits:
    state = trial.state.get(parameter, {})
    moments = tuple(k for k, v in state.items() if isinstance(v, Tensor) and v.numel() == parameter.numel())
    scalars = {key: value for key, value in state.items() if key not in moments}
    for key, value in scalars.items():
        if not (
            value is None or isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.dim() == 0)
        ):
            raise UnsupportedEngineError(
                f"Freezing with {name} would not be exact: it keeps {key!r} (of {tuple(getattr(value, 'shape', ()))}) "
                f"for a parameter of {tuple(parameter.shape)}, which belongs neither to one element nor to all alike. "
                f"{_INSTEAD}"
            )
    after = _options(trial)
    changed = tuple(
        key for key, value in after.items() if isinstance(value, bool | int | float) and value != options.get(key)
    )
    return OptimizerTraits(moments, scalars, changed)


def _distinct(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of the param groups, those that differ in more than numbers such as rates only once."""
    found: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        # Which of Adam's moments there are depends on switches, and on whether a number is zero.
        kind = {
            key: (type(value).__name__, bool(value)) if isinstance(value, int | float) else str(value)
            for key, value in options.items()
            if key not in ("lr", "initial_lr", "weight_decay")
        }
        found.setdefault(repr(sorted(kind.items())), options)
    return list(found.values())


def _like(optimizer: Optimizer, given: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """An optimizer of the same class, with the options of one of its groups, over other parameters; with no state."""
    options = dict(given)
    rate = options.get("lr")
    if isinstance(rate, float | int):
        options["lr"] = 0.01  # a warm-up may be at 0, where all optimizers are alike
    elif isinstance(rate, Tensor):
        options["lr"] = torch.full_like(rate, 0.01)
    known = inspect.signature(type(optimizer).__init__).parameters
    arguments = {key: value for key, value in {**optimizer.defaults, **options}.items() if key in known}
    try:
        made = type(optimizer)([{"params": list(parameters)}], **arguments)
    except TypeError:  # a class of the user's that is made from other things
        if hasattr(type(optimizer), "__del__"):
            raise  # a copy would free what belongs to the original
        if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
            raise  # it would step the one inside, which is the user's
        made = object.__new__(type(optimizer))
        containers = {k: copy.copy(v) for k, v in vars(optimizer).items() if isinstance(v, dict | list | set)}
        made.__dict__.update(vars(optimizer) | containers)
        made.state = type(optimizer.state)(dict)
        made.param_groups = [{}]
        without_step_hooks(made)
        made.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the original
    made.param_groups[0].update(copy.deepcopy(options))
    made.param_groups[0]["params"] = list(parameters)
    return made


def _options(optimizer: Optimizer) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}


def each_optimizer(owner: Any, tell: Callable[[Any, Any], None]) -> Callable[[], None]:
    """Call `tell(owner, optimizer)` before the first step of each of torch's optimizers, until `owner` is gone.

    Returns:
        What ends that.
    """
    if not _HEARING:  # once, and for good: torch goes through its hooks while owners may come to their end
        _HEARING.append(register_optimizer_step_pre_hook(_heard))
    _TOLD[owner] = (tell, weakref.WeakSet())
    asked = weakref.ref(owner)

    def end() -> None:
        if (there := asked()) is not None:
            _TOLD.pop(there, None)

    return end


def _heard(optimizer: Any, args: Any, kwargs: Any) -> None:
    for owner, (tell, known) in [*_TOLD.items()]:
        if optimizer not in known:
            known.add(optimizer)
            tell(owner, optimizer)
