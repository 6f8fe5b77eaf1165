"""How many kernels a step launches, counted as the operators below autograd that are not views.

A count does not depend on the device: an operator that torch runs on a CPU is a launch, or a few, on a GPU. Kernels
that are started without torch's dispatcher (Triton's, unless wrapped by torch.library) are not seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_ALSO_VIEWS = {"aten._unsafe_view.default"}  # its schema does not say that it is one


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view's schema has an argument that the result aliases and that is not written to (detach and lift, too).
        if not func.is_view and str(func) not in _ALSO_VIEWS:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_launches(step: Callable[[], None]) -> Counter[str]:
    """Operators that `step` runs, forward and backward, by name ("aten.addmm.default"); views are left out."""
    with _Counting() as counting:
        step()
    return counting.counts


def per_call(method: Mapping[str, int], floor: Mapping[str, int], calls: int) -> float:
    """What a method adds to each call of an adapted layer.

    Args:
        method: `count_launches` of a step of the method.
        floor: That of the frozen backbone in float32, its gradients started at the adapted layers' outputs.
        calls: How often adapted layers are called in a forward pass, see `count_calls`.
    """
    return (sum(method.values()) - sum(floor.values())) / calls


def count_calls(layers: list[nn.Module], forward: Callable[[], Any]) -> int:
    """Calls of these layers in `forward`: DeBERTa calls its query and key projections twice."""
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return len(calls)
