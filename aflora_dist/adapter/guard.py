"""Refuses a training whose freezing was forgotten, in whatever way the layers came into the model. Freezes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..compat.torch import backward_pass, in_backward
from ..errors import StepError


class FreezingGuard:
    """What all AFLoRA layers of one model know of who freezes their matrices.

    A training step ends in a backward pass; the guard lets one pass, and refuses what comes after it. So a step may
    run forward as often as it likes (DPO twice, gradient checkpointing once more in backward).

    Attributes:
        attached: Whether an `AdaptiveFreezing` watches the training.
        waived: The rest of the matrices is to train to the end (`AdaptiveFreezing.detach`).
    """

    def __init__(self) -> None:
        self.attached = False
        self._by: ref[Any] | None = None
        self.waived = False
        self._trained = False  # a backward pass has been seen
        self._ran_again = False  # and a forward after it
        self._compiled: int | None = None  # which one, where no layer runs as Python

    def watch_for(self, by: object | None) -> None:
        """`by`, an `AdaptiveFreezing`, watches the training from now on, as long as it is there; None: nobody does."""
        mine = ref(self)

        def gone(_: Any) -> None:  # of a training that was interrupted
            if (guard := mine()) is not None:
                guard.attached = False

        self.attached, self._by = by is not None, None if by is None else ref(by, gone)
        self._trained, self._ran_again, self._compiled = False, False, None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, and of what is read from a file, nobody watches the training."""
        return {"waived": self.waived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.waived = state["waived"]

    @property
    def is_open(self) -> bool:
        """Whether a training would go unwatched."""
        return not (self.attached or self.waived)

    def check(self) -> None:
        """Called before each forward of a layer whose matrices train and should freeze, while the guard is open.

        Raises a StepError if a training step has been taken already.
        """
        if in_backward():  # a recomputation, whose forward may have run without gradients
            again = self._ran_again
        else:
            again = self._trained and torch.is_grad_enabled()
            self._ran_again = self._trained
        if again:
            self._refuse()

    def watch(self, output: Tensor) -> None:
        """Called with what such a layer computes: its gradient tells of the backward pass."""
        output.register_hook(self._note)

    def watch_compiled(self, layer: nn.Module, parameter: nn.Parameter) -> None:
        """Learn of backward passes by a parameter, too: compiled code leaves no layer to ask.

        May be called again with the same parameter.
        """
        parameter.register_post_accumulate_grad_hook(partial(self._note_compiled, ref(layer)))

    def _note(self, grad: Tensor) -> None:
        self._trained = True

    def _note_compiled(self, layer: ref[nn.Module], parameter: Any) -> None:
        module = layer()
        if not self.is_open or self._trained or module is None or not module.training:
            return  # `check` does it
        this = backward_pass()
        if self._compiled not in (None, this):
            self._refuse()
        self._compiled = this

    def _refuse(self) -> None:
        raise StepError(
            "This AFLoRA adapter freezes adaptively, but nothing freezes it: create "
            "aflora_dist.AdaptiveFreezing(accelerator, model, optimizer, ...) after accelerator.prepare() "
            "(with Trainer: add aflora_dist.FreezingCallback), or set AFLoRAConfig(freezing='never') to "
            "train all matrices to the end."
        )
