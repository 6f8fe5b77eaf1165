"""Eq. 1 against the plain formula, in values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from aflora_dist.adapter import AFLoRALayer, AFLoRAPath
from aflora_dist.adapter.path import equation_1

IN, OUT, R = 6, 5, 3
BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}
FROZEN = [set(), {"A"}, {"B"}, {"A", "B"}]


def layer_of(
    base: nn.Module, *, frozen: set[str] = frozenset(), dropout: float = 0.0, adapters: int = 1
) -> AFLoRALayer:  # type: ignore[assignment]
    torch.manual_seed(0)
    names = [f"adapter{i}" for i in range(adapters)]
    layer = AFLoRALayer(base.requires_grad_(False), names[0])
    for name in names:
        layer.update_layer(name, r=R, d_initial=0.1, dropout=dropout, frozen=frozen, init_weights=True)
        for parameter in layer.aflora[name].parameters():
            nn.init.normal_(parameter)
    layer.set_adapter(names)
    return layer


def plain(layer: AFLoRALayer, x: Tensor) -> Tensor:
    """Eq. 1 as it stands in the paper, by autograd."""
    y = layer.base_layer(x)
    for name in layer.active_adapters:
        path = layer.aflora[name]
        y = y + path.s_b * ((path.s_d * (x @ path.A.T)) @ path.B.T)
    return y


def leaves(layer: AFLoRALayer, x: Tensor) -> list[Tensor]:
    return [p for p in (x, *layer.parameters()) if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False])
def test_the_path_computes_the_paper_s_equation(dtype: torch.dtype, plain: bool) -> None:
    """In values and gradients, up to the error of its dtype: against Eq. 1 in float64."""
    torch.manual_seed(0)
    x, W0 = torch.randn(3, 8, 64, dtype=dtype), torch.randn(48, 64, dtype=dtype)
    path = AFLoRAPath(in_features=64, out_features=48, r=4, dropout=0.0, frozen=set())
    for parameter in path.parameters():
        nn.init.normal_(parameter)
    path.to(dtype)
    leaves = {"x": x.requires_grad_(), **dict(path.named_parameters())}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    ours = path(x, base=lambda rows: rows @ W0.T, dtype=dtype, plain=plain)
    expected = equation_1(W0=W0.double(), **exact)
    upstream = torch.randn_like(ours)
    found = [ours, *torch.autograd.grad(ours, list(leaves.values()), upstream)]
    wanted = [expected, *torch.autograd.grad(expected, list(exact.values()), upstream.double())]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize(
    ("base", "frozen", "x_grad", "adapters"), [*itertools.product(BASES, FROZEN, [True, False], [1, 2])]
)
def test_values_and_gradients_equal_the_plain_formula_in_float64(
    base: str, frozen: set[str], x_grad: bool, adapters: int
) -> None:
    layer = layer_of(BASES[base](), frozen=frozen, adapters=adapters).double()
    x = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=x_grad)
    ours, expected = layer(x), plain(layer, x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    wanted = leaves(layer, x)
    for mine, theirs in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", FROZEN)
def test_gradcheck(frozen: set[str]) -> None:
    layer = layer_of(nn.Linear(IN, OUT), frozen=frozen).double()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *leaves(layer, x)[1:]))


def test_a_base_layer_that_trains_gets_its_gradient_too() -> None:
    layer = layer_of(nn.Linear(IN, OUT)).double()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    wanted = leaves(layer, x)
    ours = torch.autograd.grad(layer(x).square().sum(), wanted)
    expected = torch.autograd.grad(plain(layer, x).square().sum(), wanted)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_within_the_error_of_its_dtype(dtype: torch.dtype) -> None:
    layer = layer_of(nn.Linear(64, 48), frozen={"A"})
    torch.manual_seed(1)
    layer = AFLoRALayer(nn.Linear(64, 48).requires_grad_(False), "a")
    layer.update_layer("a", r=4, d_initial=0.1, dropout=0.0, frozen=set(), init_weights=True)
    nn.init.normal_(layer.aflora["a"].s_b)
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    exact = plain(layer, x)
    wanted = leaves(layer, x)
    upstream = torch.randn_like(exact)
    pairs = zip(
        (y.float(), *torch.autograd.grad(y, wanted, upstream.to(dtype))),
        (exact, *torch.autograd.grad(exact, wanted, upstream)),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() / theirs.norm() < 4 * torch.finfo(dtype).eps


def test_dropout_acts_on_the_path_alone_and_only_in_training() -> None:
    layer = layer_of(nn.Linear(IN, OUT), dropout=0.5)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer.eval()(x), plain(layer, x))
    torch.manual_seed(3)
    y = layer.train()(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    path = layer.aflora["adapter0"]
    torch.testing.assert_close(y, layer.base_layer(x) + path.s_b * ((path.s_d * (dropped @ path.A.T)) @ path.B.T))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    layer = layer_of(nn.Linear(IN, OUT))
    x = torch.randn(4, IN, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in leaves(layer, x)]
    for p in leaves(layer, x):
        p.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for p, e in zip(leaves(layer, x), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_the_input_is_kept_for_backward_only_while_a_trains() -> None:
    def saved(frozen: set[str]) -> int:
        layer = layer_of(nn.Linear(IN, OUT), frozen=frozen)
        kept: dict[int, int] = {}
        parameters = {p.data_ptr() for p in layer.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(100, IN, requires_grad=True) * 1.0)
        return sum(kept.values())

    folded = OUT * R * 4  # s_b B s_d, which backward needs again
    assert saved(set()) == 100 * (IN + R) * 4 + folded
    assert saved({"A"}) == saved({"A", "B"}) == 100 * R * 4 + folded


def test_nothing_is_computed_for_a_frozen_matrix() -> None:
    tokens = 50

    def backward_flops(frozen: set[str]) -> int:
        layer = layer_of(nn.Linear(IN, OUT), frozen=frozen)
        y = layer(torch.randn(tokens, IN, requires_grad=True))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        return counter.get_total_flops()

    base, through_a, through_b, M = (2 * tokens * n for n in (IN * OUT, IN * R, OUT * R, OUT * R))
    assert backward_flops({"A", "B"}) == base + through_a + through_b + M
    assert backward_flops(set()) == backward_flops({"B"}) == backward_flops({"A", "B"}) + 2 * tokens * IN * R


def test_initialisation_is_that_of_the_paper() -> None:
    path = AFLoRAPath(in_features=512, out_features=300, r=4, dropout=0.0, frozen=set())
    path.reset_parameters(0.1)
    assert path.s_d.tolist() == pytest.approx([0.1] * 4)
    assert not path.s_b.any()
    for matrix, fan_in in ((path.A, 512), (path.B, 4)):
        bound = (6 / fan_in) ** 0.5  # Kaiming uniform, a = 0
        assert matrix.abs().max().item() <= bound
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_torch_compile_takes_the_whole_model_in_one_graph_before_and_after_a_freeze() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = layer_of(nn.Linear(IN, OUT)), layer_of(nn.Linear(OUT, IN))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    model = Model()
    x = torch.randn(2, 4, IN, requires_grad=True)
    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")  # fullgraph: a graph break would be an error
    into_code = torch.compile(model, fullgraph=True)  # once: a compiler of C++ takes long
    for frozen, compiled in ((set(), traced), ({"A"}, traced), ({"A", "B"}, traced), (set(), into_code)):
        for layer in (model.up, model.down):
            layer.path("adapter0").frozen |= frozen
            layer.path("adapter0").hold_frozen()
        wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
        expected, ours = model(x), compiled(x)
        torch.testing.assert_close(ours, expected)
        for mine, theirs in zip(
            torch.autograd.grad(ours.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_layer_quantized_by_bitsandbytes(bits: int, frozen: set[str]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(64, 128)
    if bits == 4:
        base = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
    else:
        base = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    base.load_state_dict(dense.state_dict())
    base.to("cpu")  # quantizes
    layer = layer_of(base, frozen=frozen)
    assert layer.quantization_backend is not None
    x = torch.randn(3, 5, 64, requires_grad=True)
    ours, expected = layer(x), plain(layer, x)
    assert (base(x) - dense(x)).abs().max() > 1e-3  # it is quantized
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    upstream, wanted = torch.randn_like(ours), leaves(layer, x)
    for mine, theirs in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
