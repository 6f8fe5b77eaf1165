"""Which parameters of a model may freeze while they train, as what adapts it says. Freezes nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..compat.deepspeed import whole_shape
from ..errors import AFLoRAError
from ..freezing import FreezingConfig
from ..names import module_of, named_modules, named_parameters
from .adapted import Adapted
from .architectures import kind_of

_ATTACHED: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()  # by whom; both come and go
# By name, and the parameters themselves: an adapter that was made anew under its name has others.
_FROZEN: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()


class Matrices:
    """An unwrapped model without AFLoRA layers: matrices of PEFT's other tuners, or else those of its blocks.

    The interface is that of `Adapted`. Embeddings, norms, biases and heads are not among them.
    """

    own: Collection[str] = ()  # all that does not train comes with the base model

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def freezable(self) -> list[str]:
        """Trained parameters of two dimensions and more: of the tuner's, or of attention and feed-forward layers.

        None are left where an earlier training froze them all.

        Raises:
            AFLoRAError: There never were any, or the architecture is not known.
        """
        modules = named_modules(self._model, remove_duplicate=False)
        tuners = [module for module in modules.values() if isinstance(module, BaseTunerLayer)]
        chosen = {id(parameter) for tuner in tuners for parameter in _of_tuner(tuner)}
        if not tuners:
            everywhere = named_parameters(self._model, remove_duplicate=False).items()
            chosen = {id(p) for name, p in everywhere if _in_block(name, modules[module_of(name)])}
        names = [
            name
            for name, parameter in named_parameters(self._model).items()
            if id(parameter) in chosen and parameter.requires_grad and len(whole_shape(parameter)) > 1
        ]
        if names or frozen_before(self._model):
            return names
        if tuners:
            raise AFLoRAError(
                "This adapter trains nothing of two dimensions and more, which is what may freeze by default: VeRA's "
                "matrices, for one, are shared by all layers and never train. Choose what else may freeze with "
                "AdaptiveFreezing(..., freezable=...) or freezing.freezable, or train without freezing."
            )
        raise AFLoRAError(
            "To know what may freeze, AdaptiveFreezing needs an AFLoRA model (peft.get_peft_model(model, "
            "AFLoRAConfig(...))), another of PEFT's tuners, or a model whose attention and feed-forward layers it "
            f"knows and that train: of {type(self._model).__name__} it knows none that trains. Say it with "
            "AdaptiveFreezing(..., freezable=...): names of parameters, a regular expression over them, or a "
            "function of name and parameter."
        )

    def have_frozen(self, names: Collection[str]) -> None:
        """What is known of it is `frozen_by_training`."""

    @property
    def freezing_attached(self) -> bool:
        """Whether an `AdaptiveFreezing` watches this model."""
        by = _ATTACHED.get(self._model)
        return by is not None and by() is not None

    def attach(self, outer: nn.Module, by: object) -> None:
        """`by` does, from now on."""
        _ATTACHED[self._model] = ref(by)

    def detach(self, *, waived: bool) -> None:
        """None does any more; the rest trains on."""
        _ATTACHED.pop(self._model, None)


def _in_block(name: str, layer: nn.Module) -> bool:
    """Whether this parameter of a layer is attention's or of a feed-forward layer.

    torch's attention holds its projections itself, as no layers.
    """
    called = name if isinstance(layer, nn.MultiheadAttention) else module_of(name)
    return kind_of(called) is not None and not isinstance(layer, nn.Embedding)


def _of_tuner(layer: Any) -> Iterable[nn.Parameter]:
    """What a layer of PEFT's adds to the one that it wraps."""
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute, None)
        if isinstance(held, nn.Module):
            yield from held.parameters()


def remember_frozen(model: nn.Module, names: Collection[str]) -> None:
    """These have frozen by now in trainings of this model, unwrapped; what was remembered besides trains again."""
    _FROZEN[model] = {name: p for name, p in named_parameters(model).items() if name in names}


def remembered(model: nn.Module) -> Collection[nn.Parameter]:
    """Those of `frozen_by_training`; what was deleted with its adapter may be among them."""
    return _FROZEN.get(model, {}).values()


def frozen_by_training(model: nn.Module) -> set[str]:
    """What trainings of this model, unwrapped, froze in this process, whoever has switched its gradient on since."""
    known = _FROZEN.get(model, {})
    return {name for name, p in named_parameters(model).items() if known.get(name) is p} if known else set()


def frozen_before(model: nn.Module) -> set[str]:
    """What trainings of this model, unwrapped, froze, here or where an adapter was read from, and does not train."""
    names = frozen_by_training(model) | Adapted(model).frozen()
    return {n for n, p in named_parameters(model).items() if n in names and not p.requires_grad} if names else set()


def adapter_of(model: nn.Module) -> Adapted | Matrices:
    """What says of a model, unwrapped, which of its parameters may freeze."""
    adapted = Adapted(model)
    return adapted if adapted.layers else Matrices(model)


def hold_frozen(model: nn.Module, names: Collection[str]) -> bool:
    """Let these not train, as after a training of this model, unwrapped, that froze them; whether any of them did."""
    training = [p for name, p in named_parameters(model).items() if name in names and p.requires_grad]
    if training:
        adapter_of(model).have_frozen(set(names))
        remember_frozen(model, frozen_by_training(model).union(names))
    for parameter in training:
        parameter.requires_grad_(False)
        parameter.grad = None  # which would count where gradients are clipped
    return bool(training)


def thaw(model: nn.Module, names: Collection[str]) -> None:
    """Let what an earlier training of a model, unwrapped, froze train again: before an optimizer is created."""
    adapter = adapter_of(model)
    adapter.have_frozen(names)  # an adapter that was made anew does not know that they may freeze
    adapter.have_frozen(())
    remember_frozen(model, frozen_by_training(model).difference(names))
    for name, parameter in named_parameters(model).items():
        if name in names:
            parameter.requires_grad_(True)


def freezable_names(model: nn.Module, pattern: str | None = None) -> set[str]:
    """What may freeze of a model that is not prepared: by a regular expression, or as what adapts it says.

    Raises an AFLoRAError where nothing may.
    """
    if pattern is None:
        return {*adapter_of(model).freezable()}
    expression = as_expression(pattern)
    trained = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    aliases = aliases_of(model)
    chosen = {name for name in trained if any(map(expression.fullmatch, aliases[name]))}
    for name in sorted(chosen):
        refuse_half(aliases[name], [alias for alias in aliases[name] if expression.fullmatch(alias)])
    return chosen or none_chosen(pattern, [*trained])


def aliases_of(model: nn.Module) -> dict[str, list[str]]:
    """Each parameter's name -> all names that it has: a tied weight has several."""
    known = {id(parameter): name for name, parameter in named_parameters(model).items()}
    found: dict[str, list[str]] = defaultdict(list)
    for name, parameter in named_parameters(model, remove_duplicate=False).items():
        found[known[id(parameter)]].append(name)
    return found


def refuse_half(aliases: Sequence[str], chosen: Collection[str]) -> None:
    """Raise AFLoRAError where some of a tied weight's names are chosen, and others are not."""
    left, taken = ([alias for alias in aliases if (alias in chosen) is there] for there in (False, True))
    if left and taken:
        raise AFLoRAError(
            f"{taken[0]} and {left[0]} are one tied weight, and freezable chooses only the first: its twin would train "
            f"on. Choose both, or neither."
        )


def as_expression(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    """A user's regular expression over names of parameters; an AFLoRAError says what is wrong with it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AFLoRAError(f"freezable={pattern!r} is no regular expression over parameter names: {error}.") from None


def none_chosen(choice: object, trained: Sequence[str]) -> NoReturn:
    """Raise AFLoRAError: nothing that trains was chosen."""
    raise AFLoRAError(
        f"freezable={choice!r} chooses none of the {len(trained)} parameters that train: {', '.join(trained[:3])}, ... "
        f"A regular expression has to match whole names."
    )


def refuse_loaded_to_infer(model: nn.Module) -> None:
    """Raise AFLoRAError where nothing of a model, unwrapped, trains because PEFT has loaded its adapter so."""
    active = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.active_adapters}
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    found = [name for name, config in configs.items() if name in active and config.inference_mode]
    if found and not any(p.requires_grad for p in model.parameters()):
        raise AFLoRAError(
            f"The adapter {found[0]!r} was loaded for inference alone, and nothing trains: load it with "
            f"PeftModel.from_pretrained(..., is_trainable=True)."
        )


def refuse_decided(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> None:
    """Raise AFLoRAError where an adapter itself decides what of these goes on: AdaLoRA, by their gradients."""
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if decided := next((name for name, parameter in chosen.items() if id(parameter) in theirs), None):
        raise AFLoRAError(
            f"AdaLoRA itself decides while training which of its singular values go on, by gradients that {decided} "
            f"would have no more: use LoRA (LoraConfig), or choose what lies outside of it with freezable=..., such as "
            f"the head."
        )


def refuse_all(
    found: Collection[str],
    trained: Collection[str],
    config: FreezingConfig,
    what: str = "All that trains may freeze",
    remedy: str = "Leave something out (AdaptiveFreezing(..., freezable=...), freezing.freezable), or have the last "
    "one train on, with rule='rank' and t_f = 0: final_steps=0 in FreezingConfig, final_epochs=0 in FreezingCallback, "
    "freezing.final_epochs=0 in `aflora train`.",
) -> None:
    """Raise AFLoRAError, which begins with `what` and ends with `remedy`, if all that trains would freeze."""
    if found and len(found) == len(trained) and (config.final_steps or config.rule != "rank"):
        raise AFLoRAError(f"{what}, so that nothing would be left to train at the end. {remedy}")
