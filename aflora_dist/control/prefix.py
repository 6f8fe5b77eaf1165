"""Freezing the lowest blocks whole, so that the backward pass ends above them. Decides; drops nothing itself.

Autograd ends where nothing below needs a gradient: once all that trains in the lowest blocks has frozen, no operator of
theirs is run backward and none of their activations is kept, on any engine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapter.freezable import refuse_all
from ..compat.transformers import recomputes_reentrantly
from ..engines import Engine
from ..errors import AFLoRAError
from ..freezing import CubicSchedule, FreezingConfig
from ..names import matrix_position, named_modules, named_parameters, of_base
from ..notices import logger

# What an encoder holds beside its blocks and gives to the lowest of them, too: embeddings of relative positions (those
# of DeBERTa and MPNet), their norm, and a convolution over the embeddings.
_GIVEN = re.compile(r"(rel_embeddings|relative_attention_bias|LayerNorm|conv)\.")


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
        trained = {name for group in engine.members for name in group}
        self.blocks = blocks_from_below(engine.model, trained, freezable, config)
        self.frozen = 0
        self._engine, self._model = engine, engine.model
        self._handles: list[Any] = []

    def due(self, step: int, remaining: Iterable[str]) -> list[str]:
        """What freezes after this step besides what did by its score.

        Args:
            remaining: What may freeze by its score and has not.
        """
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
        return names

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
            self._handles.append(module.register_forward_hook(lambda module, inputs, output: output.detach()))

    def _look(self) -> None:
        """Warn if the next output of the lowest block needs a gradient all the same: what it is given then trains."""
        where = self.blocks[0][-1]

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return
            handle.remove()
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.requires_grad:
                logger.warning(
                    f"the whole block of {where} has frozen, and the backward pass still goes through it: something "
                    f"that trains outside of the blocks goes into them. Let it not train, or prefix=True saves no time."
                )

        handle = self._block(0).register_forward_hook(look)
        self._handles.append(handle)

    def _block(self, index: int) -> nn.Module:
        """The module of a block, as what wraps it; above the highest all of the model."""
        places = [matrix_position(names[-1]) for names in self.blocks]
        stack = next(module for name, module in named_modules(self._model).items() if of_base(name) == places[0].stack)
        number = places[index].layer if index < len(places) else places[-1].layer + 1
        return dict(stack.named_children()).get(str(number), self._model)

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


def blocks_from_below(
    model: nn.Module, trained: Collection[str], freezable: Collection[str], config: FreezingConfig
) -> list[list[str]]:
    """Names of all parameters of each block that train, as `Prefix.blocks` and with its errors.

    Args:
        model: Unwrapped; may be on the meta device.
        trained: Names of what the optimizer updates from the start.
        freezable: What of it freezes by its score.
    """
    stacks = {matrix_position(name).stack for name in freezable} - {""}
    if len(stacks) != 1 or any(matrix_position(name).layer < 0 for name in freezable):
        where = f"in {len(stacks)} stacks" if len(stacks) > 1 else "outside of numbered blocks"
        raise AFLoRAError(
            f"FreezingConfig(prefix=True) freezes a model's blocks from the bottom, and what may freeze here lies "
            f"{where}. Drop prefix, or choose with freezable=... what lies in the blocks of one stack."
        )
    (stack,) = stacks
    around, _, _ = stack.rpartition(".")
    blocks: dict[int, list[str]] = {}
    below: list[str] = []
    for name in named_parameters(model):
        found, inside = matrix_position(name), of_base(name).removeprefix(f"{around}.")
        if name not in trained:
            continue
        if found.stack == stack and found.layer >= 0:
            blocks.setdefault(found.layer, []).append(name)
        elif not blocks or (around and _GIVEN.match(inside)):
            below.append(name)
    ordered = [blocks[number] for number in sorted(blocks)]
    ordered[0] = below + ordered[0]
    may = set(freezable)
    ordered = list(takewhile(lambda block: may & {*block}, ordered))
    if not ordered:
        raise AFLoRAError(
            f"FreezingConfig(prefix=True) freezes a model's blocks from the bottom, and in the lowest one that trains "
            f"nothing may freeze: {blocks[min(blocks)][0]}, ... Drop prefix, or choose that with freezable=..., too."
        )
    if config.prefix_schedule().final_steps:
        refuse_all(may.union(*ordered), trained, config)
    _refuse(model, ordered[0])
    return ordered


def _refuse(model: nn.Module, lowest: Sequence[str]) -> None:
    ids = {id(p): name for name, p in named_parameters(model).items()}
    twins: dict[str, list[str]] = {}
    for alias, parameter in named_parameters(model, remove_duplicate=False).items():
        twins.setdefault(ids[id(parameter)], []).append(alias)
    tied = [name for name in lowest if len(twins[name]) > 1]
    if tied:
        raise AFLoRAError(
            f"FreezingConfig(prefix=True) freezes {tied[0]} with the lowest block, and it is one weight with "
            f"{next(alias for alias in twins[tied[0]] if alias != tied[0])}, which would train on. Drop prefix, "
            f"or let that weight not train."
        )
    if recomputes_reentrantly(model):
        raise AFLoRAError(
            "FreezingConfig(prefix=True): a block that torch checkpoints reentrantly has no gradient where its "
            "input needs none. Switch it on with "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
