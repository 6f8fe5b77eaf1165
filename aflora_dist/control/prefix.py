"""Freezing the lowest blocks whole, so that the backward pass ends above them. Decides; drops nothing itself.

Autograd ends where nothing below needs a gradient: once all that trains in the lowest blocks has frozen, no operator of
theirs is run backward and none of their activations is kept, on any engine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter.freezable import aliases_of, frozen_before, refuse_all
from ..compat.transformers import recomputes_reentrantly
from ..engines import Engine
from ..errors import AFLoRAError
from ..freezing import CubicSchedule, FreezingConfig
from ..names import matrix_position, named_modules, named_parameters, of_base
from ..notices import logger
from .frozen import Hook

# What lies beside the blocks, registered after them, and is given to the lowest of them, too: embeddings of relative
# positions (those of DeBERTa and MPNet) and a convolution over the embeddings; where there are such embeddings, their
# norm. XLM-RoBERTa-XL's norm of that name comes after the highest block.
_GIVEN = re.compile(r"(rel_embeddings|relative_attention_bias|conv)\.")
_GIVEN_AND_NORM = re.compile(rf"{_GIVEN.pattern}|LayerNorm\.")
# What lies beside the blocks, registered before them, and comes after the highest of them: in OPT, GTE, T5Gemma, ...
_AFTER = re.compile(r"(final_layer_norm|final_norm|layer_norm|layernorm|norm|project_out|pooler)\.")
# What of a model of a user's own is its head, wherever it is registered.
_HEAD = re.compile(
    r"(\w+_)?(heads?|classifier|score|scorer|logits|lm_head|out|output|outputs|fc|fc_out|to_logits|qa_outputs)\."
)


class Prefix:
    """The blocks of a model from the bottom, and how many of them may have frozen whole.

    A block freezes whole when all in it that freezes by its score has, from the bottom on, and no earlier than at the
    share r_p(t) of the blocks: Eq. 5 with t_p for t_f (`FreezingConfig.prefix_steps`).

    Args:
        freezable: What freezes by its score.

    Attributes:
        blocks: From the bottom, as far as something in each may freeze by its score: all parameters of a block that
            the optimizer was given. What lies before the first block (embeddings), or beside the blocks and goes into
            all of them, belongs to it.
        frozen: How many of them have frozen whole.

    Raises:
        AFLoRAError: There are no numbered blocks of one stack; all that trains would freeze; a trained weight below is
            tied to one above; or reentrant checkpointing, which has no gradient for a block whose input needs none.
    """

    def __init__(self, engine: Engine, freezable: Sequence[str], config: FreezingConfig) -> None:
        self.schedule: CubicSchedule = config.prefix_schedule()
        self._freezable = set(freezable)
        self.blocks = blocks_from_below(engine.model, {*engine.trainable}, freezable, config)
        self.frozen = 0
        self._engine, self._model = engine, engine.model
        self._handles: list[Any] = []
        self._froze_at: int | None = None  # until it has been looked whether the block above is still reached

    def due(self, step: int, remaining: Iterable[str]) -> list[str]:
        """What freezes after this step besides what did by its score.

        Args:
            remaining: What may freeze by its score and has not.
        """
        if self._froze_at is not None and step > self._froze_at:
            self._froze_at = None
            self._look_above()
        waiting = set(remaining)
        allowed = self.schedule.count(step, len(self.blocks))
        names: list[str] = []
        before = self.frozen
        while self.frozen < len(self.blocks) and not waiting & {*self.blocks[self.frozen]}:
            rest = [name for name in self.blocks[self.frozen] if name not in self._freezable]
            if rest and self.frozen >= allowed:
                break
            names += rest
            self.frozen += 1
        if self.frozen != before:
            self._let_go()
            self._froze_at = step
        return names

    def _look_above(self) -> None:
        """Warn if the lowest block that trains has had no gradient: a user's own checkpointing may end too early."""
        above = self.blocks[self.frozen] if self.frozen < len(self.blocks) else []
        parameters = [self._engine.parameters[name] for name in above]
        if not parameters or self._engine.kind.startswith("zero"):  # DeepSpeed leaves no gradients there
            return
        if all(parameter.grad is None and parameter.requires_grad for parameter in parameters):
            logger.warning(
                f"{above[0]} has had no gradient since the block below it froze. Where the model calls "
                f"torch.utils.checkpoint itself, pass use_reentrant=False: the other kind has no gradient for a block "
                f"whose input needs none."
            )

    def _let_go(self) -> None:
        """Nobody needs a gradient of the embeddings any more, for which PEFT asks where activations are recomputed."""
        if self.frozen:
            self._engine.end_backward_at(self._block(self.frozen))
        if not self.frozen or self._handles:
            return
        self._look()
        models = [module for module in self._model.modules() if isinstance(module, PreTrainedModel)]
        embeddings = {id(found): found for model in models if (found := model.get_input_embeddings()) is not None}
        for module in embeddings.values():  # after the hook that asks
            self._handles.append(module.register_forward_hook(_Detach()))

    def _look(self) -> None:
        """Warn if the next output of the lowest block needs a gradient all the same: what it is given then trains."""
        self._handles.append(self._block(0).register_forward_hook(_Look(self.blocks[0][-1])))

    def _block(self, index: int) -> nn.Module:
        """The module of a block, inside of what wraps it; above the highest all of the model."""
        stack = matrix_position(next(iter(self._freezable))).stack  # what lies below may be numbered in another one
        each = (map(matrix_position, names) for names in self.blocks)
        numbers = [next(at.layer for at in places if at.stack == stack and at.layer >= 0) for places in each]
        number = numbers[index] if index < len(numbers) else numbers[-1] + 1
        wanted = f"{_inside(stack)}{number}"
        blocks = (module for name, module in named_modules(self._model).items() if of_base(name) == wanted)
        return next(blocks, self._model)

    def take_back(self) -> None:
        """Leave the model's modules as they were."""
        self._engine.end_backward_at(None)
        while self._handles:
            self._handles.pop().remove()

    def restore(self, frozen: Iterable[str]) -> None:
        """As after these have frozen."""
        gone, self.frozen = set(frozen), 0
        self.take_back()
        while self.frozen < len(self.blocks) and not {*self.blocks[self.frozen]} - gone:
            self.frozen += 1
        self._let_go()


class _Detach(Hook):
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach()


class _Look(Hook):
    """Looks once at what comes out of a block."""

    def __init__(self, where: str) -> None:
        self.where, self.done = where, False

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.done or not torch.is_grad_enabled():
            return
        self.done = True
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.requires_grad:
            logger.warning(
                f"the whole block of {self.where} has frozen, and the backward pass still goes through it: something "
                f"that trains outside of the blocks goes into them. Let it not train, or prefix=True saves no time."
            )


def blocks_from_below(
    model: nn.Module, trained: Collection[str], freezable: Collection[str], config: FreezingConfig
) -> list[list[str]]:
    """Names of all parameters of each block that train, as `Prefix.blocks` and with its errors.

    Args:
        model: Unwrapped; may be on the meta device.
        trained: Names of what the optimizer updates from the start.
        freezable: What of it freezes by its score.
    """
    positions = [matrix_position(name) for name in freezable]
    stacks = {at.stack for at in positions if at.layer >= 0}
    if len(stacks) != 1 or any(at.layer < 0 for at in positions):
        where = f"in {len(stacks)} stacks" if len(stacks) > 1 else "outside of numbered blocks"
        raise AFLoRAError(
            f"FreezingConfig(prefix=True) freezes a model's blocks from the bottom, and what may freeze here lies "
            f"{where}. Drop prefix, or choose with freezable=... what lies in the blocks of one stack."
        )
    (stack,) = stacks
    places = _places(model, stack)
    blocks: dict[int, list[str]] = {}
    below: list[str] = []
    aliases = aliases_of(model)
    for name, each in aliases.items():
        found = [place for alias in each if (place := places[alias]) is not None]
        if name in trained and found:
            (below if min(found) < 0 else blocks.setdefault(min(found), [])).append(name)
    ordered = [blocks[number] for number in sorted(blocks)]
    ordered[0] = below + ordered[0]
    may = set(freezable)
    there = {places[name] for name in may | frozen_before(model)}  # a training before this one may have frozen it
    ordered = [
        block for number, block in takewhile(lambda at: at[0] in there, zip(sorted(blocks), ordered, strict=True))
    ]
    if not ordered:
        raise AFLoRAError(
            f"FreezingConfig(prefix=True) freezes a model's blocks from the bottom, and in the lowest one that trains "
            f"nothing may freeze: {blocks[min(blocks)][0]}, ... Drop prefix, or choose that with freezable=..., too."
        )
    if config.prefix_schedule().final_steps:
        remedy = (
            "Let something outside of the blocks train, too, or have the highest block train on, with prefix_steps=0 "
            "in FreezingConfig, prefix_epochs=0 in FreezingCallback, freezing.prefix_epochs=0 in `aflora train`."
        )
        refuse_all(may.union(*ordered), trained, config, "All that trains would freeze with its block", remedy)
    here = (-1, min(blocks))
    _refuse(model, {n: alias for n in ordered[0] for alias in aliases[n] if places[alias] not in here})
    return ordered


def _places(model: nn.Module, stack: str) -> dict[str, int | None]:
    """Of all parameters, by all of their names: the block's number; -1: goes into the lowest; None: into none of them.

    What goes in is told by the order of modules. What a head registers before its base model (XLM-RoBERTa) does not.
    """
    names = {name: of_base(name) for name in named_parameters(model, remove_duplicate=False)}
    around = stack[: stack.rfind(".") + 1]
    given = _GIVEN_AND_NORM if any(n.startswith(f"{around}rel_embeddings.") for n in names.values()) else _GIVEN
    base, places, reached = _base_of(model, stack), dict[str, int | None](), False
    for name, inside in names.items():
        number = inside.removeprefix(_inside(stack)).partition(".")[0] if inside.startswith(_inside(stack)) else ""
        beside = inside.removeprefix(around) if inside.startswith(around) else ""
        reached = reached or number.isdigit()
        if number.isdigit():
            places[name] = int(number)
        else:
            before = inside.startswith(base) and not _AFTER.match(beside) and not (not base and _HEAD.match(inside))
            goes_in = given.match(beside) if reached else before
            places[name] = -1 if goes_in else None
    return places


def _inside(stack: str) -> str:
    """How names of what lies in a stack begin."""
    return f"{stack}." if stack else ""


def _base_of(model: nn.Module, stack: str) -> str:
    """How names begin in the base model of transformers' that holds the blocks; "" where it is not part of another."""
    for name, module in named_modules(model).items():
        if isinstance(module, PreTrainedModel):
            around = of_base(f"{name}." if name else "")
            bases = (f"{around}{module.base_model_prefix}.", around)  # the latter: of a user's own model around it
            return next((base for base in bases if stack.startswith(base)), "")
    return ""


def _refuse(model: nn.Module, tied: Mapping[str, str]) -> None:
    """`tied`: of what freezes with the lowest block, another name elsewhere."""
    for name, elsewhere in tied.items():
        raise AFLoRAError(
            f"FreezingConfig(prefix=True) freezes {name} with the lowest block, and it is one weight with {elsewhere}, "
            f"which would train on. Drop prefix, or let that weight not train."
        )
    if recomputes_reentrantly(model):
        raise AFLoRAError(
            "FreezingConfig(prefix=True): a block that torch checkpoints reentrantly has no gradient where its "
            "input needs none. Switch it on with "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
