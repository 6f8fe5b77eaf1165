"""The k-th smallest of numbers that lie on many ranks, exactly, with four small sums over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BITS = 8


def quantile(values: Sequence[Tensor], fraction: float, sum_over_ranks: Callable[[Tensor], Tensor]) -> float:
    """The floor(fraction * n)-th smallest of all ranks' n values; minus infinity where that is none.

    A radix select: the bit pattern of a non-negative float rises with its value, so its digits are found from the
    highest on, by counting.

    Args:
        values: This rank's, float32, not negative. Any shapes.
        fraction: In [0, 1].
        sum_over_ranks: Adds an int64 vector up over the ranks, in place. A collective.
    """
    patterns = [value.reshape(-1).view(torch.int32) for value in values]
    total = int(sum_over_ranks(torch.tensor([sum(pattern.numel() for pattern in patterns)], dtype=torch.int64)).item())
    k = int(fraction * total)
    if k == 0:
        return float("-inf")
    found = 0
    for shift in range(32 - _BITS, -1, -_BITS):
        counts = torch.zeros(2**_BITS, dtype=torch.int64)
        for pattern in patterns:
            counts += torch.bincount((pattern >> shift) & (2**_BITS - 1), minlength=2**_BITS).cpu()
        below = torch.cumsum(sum_over_ranks(counts), 0)
        digit = int(torch.searchsorted(below, k).item())
        k -= int(below[digit - 1].item()) if digit else 0
        found |= digit << shift
        patterns = [pattern[((pattern >> shift) & (2**_BITS - 1)) == digit] for pattern in patterns]
    return float(torch.tensor(found, dtype=torch.int64).to(torch.int32).view(torch.float32).item())
