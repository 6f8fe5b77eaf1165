"""Other ways to compute Eq. 1's forward and backward, against the one in aflora_dist/adapter/eq1.py.

    python -m profiling.variants                          # 1,024 tokens, fp32
    python -m profiling.variants --tokens 16384           # the paper's 64 x 256

One transformer block's six linear layers, all matrices frozen, products written out without autograd, so that
a variant's own work is all that differs. Variants take turns in random order in one process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm


@dataclass
class Layer:
    """One linear layer with its input x (tokens, in) and the gradient g (tokens, out) of its output."""

    x: Tensor
    g: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    s_d: Tensor
    s_b: Tensor
    folded_weight: Tensor

    @property
    def up(self) -> Tensor:
        return self.s_b.unsqueeze(1) * self.B * self.s_d

    def vectors(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of s_b and s_d from M = g^T h, (out, r)."""
        MB = M * self.B
        return MB @ self.s_d, self.s_b @ MB


def floor(block: list[Layer]) -> None:
    for a in block:
        torch.addmm(a.bias, a.x, a.weight.T)
        a.g @ a.weight


def plain(block: list[Layer]) -> None:
    """Eq. 1 as it is written, with the temporaries of the output's size that autograd makes."""
    for a in block:
        h = a.x @ a.A.T
        u = (h * a.s_d) @ a.B.T
        torch.addmm(a.bias, a.x, a.weight.T) + a.s_b * u
        (a.g * u).sum(0)
        n = (a.g * a.s_b) @ a.B
        (n * h).sum(0)
        a.g @ a.weight + (n * a.s_d) @ a.A


def fused(block: list[Layer], M_as_gTh: bool = False) -> None:
    """Each layer folds for itself, for forward and again for backward."""
    for a in block:
        h = a.x @ a.A.T
        y = torch.addmm(a.bias, a.x, a.weight.T)
        torch.addmm(y, h, a.up.T, out=y)
        n = a.g @ a.up
        a.vectors(a.g.T @ h if M_as_gTh else (h.T @ a.g).T)
        grad = a.g @ a.weight
        torch.addmm(grad, n, a.A, out=grad)


def fused_slow_side(block: list[Layer]) -> None:
    fused(block, M_as_gTh=True)


def together(block: list[Layer]) -> None:
    """What the library does: (s_b B s_d)^T of all layers at once, kept for backward, and all vectors' gradients."""
    outs = [len(a.B) for a in block]
    owner = torch.arange(len(block)).repeat_interleave(torch.tensor(outs)).to(block[0].B.device)

    def stacked() -> tuple[Tensor, Tensor, Tensor]:
        D = torch.stack([a.s_d for a in block], 1).index_select(1, owner)
        return torch.cat([a.s_b for a in block]).unsqueeze(0), D, torch.cat([a.B for a in block]).T

    S, D, B = stacked()
    ups = (D * S).mul_(B).split(outs, 1)
    found = []
    for a, up in zip(block, ups, strict=True):
        h = a.x @ a.A.T
        y = torch.addmm(a.bias, a.x, a.weight.T)
        torch.addmm(y, h, up, out=y)
        n = a.g @ up.T
        found.append(h.T @ a.g)
        grad = a.g @ a.weight
        torch.addmm(grad, n, a.A, out=grad)
    S, D, B = stacked()
    MB = torch.cat(found, 1) * B
    (MB * D).sum(0)
    for part in (MB * S).split(outs, 1):
        part.sum(1)


def folded(block: list[Layer], again: bool = False) -> None:
    """W0 + (s_b B s_d) A in one matrix, made once per step and kept, or made `again` for backward."""
    for a in block:
        W = torch.addmm(a.weight, a.up, a.A, out=a.folded_weight)
        h = a.x @ a.A.T
        torch.addmm(a.bias, a.x, W.T)
        if again:
            torch.addmm(a.weight, a.up, a.A, out=a.folded_weight)
        a.vectors((h.T @ a.g).T)
        a.g @ W


def folded_twice(block: list[Layer]) -> None:
    folded(block, again=True)


def shared(block: list[Layer]) -> None:
    """As fused, but query, key and value, which have one input, share the products with their stacked A."""
    three, rest = block[:3], block[3:]
    stacked = torch.cat([a.A for a in three])
    h_all = three[0].x @ stacked.T
    r = three[0].A.shape[0]
    n = []
    for i, a in enumerate(three):
        h = h_all[:, i * r : (i + 1) * r]
        y = torch.addmm(a.bias, a.x, a.weight.T)
        torch.addmm(y, h, a.up.T, out=y)
        n.append(a.g @ a.up)
        a.vectors((h.T @ a.g).T)
    grad = torch.cat(n, dim=1) @ stacked
    for a in three:
        torch.addmm(grad, a.g, a.weight, out=grad)
    fused(rest)


VARIANTS: dict[str, Callable[[list[Layer]], None]] = {
    "floor: the frozen layers alone": floor,
    "plain Eq. 1": plain,
    "fused, M as g^T h": fused_slow_side,
    "fused, M as (h^T g)^T": fused,
    "fused, folded together and transposed (the library)": together,
    "fused, q, k and v sharing products": shared,
    "folded into a second copy of the weight": folded,
    "folded for forward, and again for backward": folded_twice,
}


def block(tokens: int, hidden: int, r: int, device: torch.device) -> list[Layer]:
    inputs = {size: torch.randn(tokens, size, device=device) for size in (hidden, 4 * hidden)}
    layers = []
    for n_in, n_out in [(hidden, hidden)] * 4 + [(hidden, 4 * hidden), (4 * hidden, hidden)]:
        shapes = [(tokens, n_out), (n_out, n_in), (n_out,), (r, n_in), (n_out, r), (r,), (n_out,), (n_out, n_in)]
        layers.append(Layer(inputs[n_in], *(0.02 * torch.randn(shape, device=device) for shape in shapes)))
    return layers


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print the table; return each variant's median time over the floor's."""
    parser = argparse.ArgumentParser(prog="python -m profiling.variants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = block(args.tokens, args.hidden, args.r, device)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in tqdm(range(args.rounds + 3), desc="rounds"):
        for name in random.sample(list(VARIANTS), len(VARIANTS)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            VARIANTS[name](layers)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lowest = medians["floor: the frozen layers alone"]
    print("| variant | ms | x floor |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median * 1e3:.1f} | {median / lowest:.3f} |")
    return {name: median / lowest for name, median in medians.items()}


if __name__ == "__main__":
    main()
