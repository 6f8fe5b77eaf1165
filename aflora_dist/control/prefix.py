"""Freezing the lowest blocks whole, so that the backward pass ends above them. Decides; drops nothing itself.

Autograd ends where nothing below needs a gradient: once all that trains in the lowest blocks has frozen, no operator of
theirs is run backward and none of their activations is kept, on any engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..compat.transformers import recomputes_reentrantly
from ..engines import Engine
from ..errors import AFLoRAError
from ..freezing import CubicSchedule, FreezingConfig
from ..names import matrix_position, named_parameters


class Prefix:
    """The blocks of a model from the bottom, and how many of them may have frozen whole.

    A block freezes whole when all in it that freezes by its score has, from the bottom on, and no earlier than at the
    share r_p(t) of the blocks: Eq. 5 with t_p for t_f (`FreezingConfig.prefix_steps`).

    Args:
        freezable: What freezes by its score.

    Attributes:
        blocks: From the bottom: all parameters of a block that the optimizer was given. What lies before the first
            block (embeddings) belongs to it.
        frozen: How many of them have frozen whole.

    Raises:
        AFLoRAError: There are no numbered blocks of one stack; a trained weight below is tied to one above; or
            reentrant checkpointing, which has no gradient for a block whose input needs none.
    """

    def __init__(self, engine: Engine, freezable: Sequence[str], config: FreezingConfig) -> None:
        self.schedule: CubicSchedule = config.prefix_schedule()
        self._freezable = set(freezable)
        trained = {name for group in engine.members for name in group}
        order = [name for name in engine.parameters if name in trained]
        self.blocks = self._find(order)
        self.frozen = 0
        self._model = engine.model
        self._handles: list[Any] = []
        self._refuse(engine.model)

    def _find(self, order: Sequence[str]) -> list[list[str]]:
        stacks = {matrix_position(name).stack for name in self._freezable} - {""}
        if len(stacks) != 1 or any(matrix_position(name).layer < 0 for name in self._freezable):
            where = f"in {len(stacks)} stacks" if len(stacks) > 1 else "outside of numbered blocks"
            raise AFLoRAError(
                f"FreezingConfig(prefix=True) freezes a model's blocks from the bottom, and what may freeze here lies "
                f"{where}. Drop prefix, or choose with freezable=... what lies in the blocks of one stack."
            )
        (stack,) = stacks
        blocks: dict[int, list[str]] = {}
        below: list[str] = []
        for name in order:
            found = matrix_position(name)
            if found.stack == stack and found.layer >= 0:
                blocks.setdefault(found.layer, []).append(name)
            elif not blocks:
                below.append(name)
        ordered = [blocks[number] for number in sorted(blocks)]
        ordered[0] = below + ordered[0]
        return ordered

    def _refuse(self, model: nn.Module) -> None:
        ids = {id(p): name for name, p in named_parameters(model).items()}
        twins: dict[str, list[str]] = {}
        for alias, parameter in named_parameters(model, remove_duplicate=False).items():
            twins.setdefault(ids[id(parameter)], []).append(alias)
        tied = [name for name in self.blocks[0] if len(twins[name]) > 1]
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

    def due(self, step: int, remaining: Iterable[str]) -> list[str]:
        """What freezes after this step besides what did by its score.

        Args:
            remaining: What may freeze by its score and has not.
        """
        waiting = set(remaining)
        allowed = self.schedule.count(step, len(self.blocks))
        names: list[str] = []
        while self.frozen < len(self.blocks) and not waiting & {*self.blocks[self.frozen]}:
            rest = [name for name in self.blocks[self.frozen] if name not in self._freezable]
            if rest and self.frozen >= allowed:
                break
            names += rest
            self.frozen += 1
        self._let_go()
        return names

    def _let_go(self) -> None:
        """Nobody needs a gradient of the embeddings any more, for which PEFT asks where activations are recomputed."""
        if not self.frozen or self._handles:
            return
        models = [module for module in self._model.modules() if isinstance(module, PreTrainedModel)]
        embeddings = {id(found): found for model in models if (found := model.get_input_embeddings()) is not None}
        for module in embeddings.values():  # after the hook that asks
            self._handles.append(module.register_forward_hook(lambda module, inputs, output: output.detach()))

    def _take_back(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def restore(self, frozen: Iterable[str]) -> None:
        """As after these have frozen."""
        gone, self.frozen = set(frozen), 0
        self._take_back()
        while self.frozen < len(self.blocks) and not {*self.blocks[self.frozen]} - gone:
            self.frozen += 1
        self._let_go()
