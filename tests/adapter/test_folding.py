"""What is folded for a whole model at once, against every layer for itself and the plain formula."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from aflora_dist import AFLoRAConfig
from aflora_dist.adapter import AFLoRALayer
from aflora_dist.adapter.casts import cast_once
from aflora_dist.errors import StepError

SIZES = (6, 5, 6, 7)


class Net(nn.Module):
    """Three layers of different sizes, of which the second is called twice and one more never."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 5), Conv1D(5, 5), nn.Linear(5, 7)
        self.idle = nn.Linear(6, 6)
        self.checkpointing = checkpointing

    def body(self, x: Tensor) -> Tensor:
        return self.mid(self.mid(x.tanh()).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = self.body(h) if self.checkpointing is None else checkpoint(self.body, h, use_reentrant=self.checkpointing)
        return self.down(h)


def adapted(checkpointing: bool | None = None, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = AFLoRAConfig(
        r=3, target_modules=["up", "mid", "down", "idle"], freezable="all", freezing="never", **options
    )  # type: ignore[arg-type]
    model = get_peft_model(Net(checkpointing).to(dtype), config)
    for name, parameter in model.named_parameters():
        if ".aflora." in name:
            nn.init.normal_(parameter)
    return model


@contextmanager
def unfolded(model: nn.Module) -> Iterator[None]:
    """Every layer for itself, as under ZeRO-3."""
    net = model.get_base_model()
    hooks = net._forward_pre_hooks.copy()
    net._forward_pre_hooks.clear()
    yield
    net._forward_pre_hooks.update(hooks)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """Eq. 1 as it stands in the paper, by autograd."""
    net = model.get_base_model()

    def layer(of: nn.Module, x: Tensor) -> Tensor:
        path = of.aflora["default"]
        return of.base_layer(x) + path.s_b * ((path.s_d * (x @ path.A.T)) @ path.B.T)

    h = layer(net.up, x).tanh()
    return layer(net.down, layer(net.mid, layer(net.mid, h).tanh()).tanh())


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours: dict[str, Tensor | None], expected: dict[str, Tensor | None], **tolerance: float) -> None:
    assert {n for n, g in ours.items() if g is not None} == {n for n, g in expected.items() if g is not None}
    for name, theirs in expected.items():
        if theirs is not None:
            torch.testing.assert_close(ours[name], theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("frozen", [set(), {"A"}, {"B"}, {"A", "B"}])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_folded_together_alone_and_written_plainly_are_the_same(frozen: set[str], checkpointing: bool | None) -> None:
    model = adapted(checkpointing)
    for layer in (m for m in model.modules() if isinstance(m, AFLoRALayer)):
        layer.path("default").frozen |= frozen
        layer.path("default").hold_frozen()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = gradients(plain(model, x).square().sum(), model)
    ours = model(x)
    torch.testing.assert_close(ours, plain(model, x), rtol=0, atol=1e-12)
    together = gradients(ours.square().sum(), model)
    with unfolded(model):
        alone = gradients(model(x).square().sum(), model)
    assert_same(together, expected, rtol=0, atol=1e-11)
    assert_same(alone, expected, rtol=0, atol=1e-11)
    assert together["base_model.model.idle.aflora.default.s_b"] is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_other_forwards_between_forward_and_backward_do_not_disturb_a_recomputation(checkpointing: bool) -> None:
    """As DPO's reference model and GRPO's sampling come in between."""
    model = adapted(checkpointing)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(plain(model, x).square().sum(), model)
    loss = model(x).square().sum()
    with torch.no_grad():
        model(x + 1)
    with model.disable_adapter():
        model(x)
    assert_same(gradients(loss, model), expected, rtol=0, atol=1e-11)
    first, second = model(x), model(2 * x)
    expected = gradients(plain(model, x).square().sum() + plain(model, 2 * x).square().sum(), model)
    assert_same(gradients(first.square().sum() + second.square().sum(), model), expected, rtol=0, atol=1e-11)


def test_backward_twice_over_a_kept_graph_accumulates() -> None:
    model = adapted()
    x = torch.randn(4, 6, dtype=torch.float64)
    loss = model(x).square().sum()
    once = gradients(plain(model, x).square().sum(), model)
    model.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: None if grad is None else 2 * grad for name, grad in once.items()}
    assert_same({n: p.grad for n, p in model.named_parameters()}, twice)


@pytest.mark.parametrize("together", [True, False])
def test_differentiable_twice(together: bool) -> None:
    model = adapted()
    with nullcontext() if together else unfolded(model):
        wanted = [p for n, p in model.named_parameters() if p.requires_grad and "idle" not in n]
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

        def penalty(y: Tensor) -> list[Tensor]:
            """Gradients of a gradient's norm, as WGAN-GP and MAML take them."""
            first = torch.autograd.grad(y.square().sum(), [x, *wanted], create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *wanted]))

        for mine, theirs in zip(penalty(model(x)), penalty(plain(model, x)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *wanted))


def test_a_parameter_changed_before_backward_is_an_error_as_in_torch() -> None:
    model = adapted()
    loss = model(torch.randn(4, 6, dtype=torch.float64)).sum()
    with torch.no_grad():
        model.get_base_model().up.aflora["default"].B.add_(1)
    with pytest.raises(StepError, match="modified by an inplace operation between forward and backward"):
        loss.backward()


def test_each_forward_sees_the_weights_of_its_time_however_they_were_changed() -> None:
    model = adapted()
    x = torch.randn(4, 6, dtype=torch.float64)
    path = model.get_base_model().up.aflora["default"]
    for change in (
        lambda: path.B.data.mul_(2),  # as DeepSpeed writes, which torch's versions do not count
        lambda: path.s_d.detach().add_(1),
        lambda: setattr(path.s_b, "data", torch.ones_like(path.s_b)),
        lambda: path.load_state_dict({n: torch.randn_like(p) for n, p in path.named_parameters()}),
    ):
        model(x)
        change()
        torch.testing.assert_close(model(x), plain(model, x), rtol=0, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(model, x), rtol=0, atol=1e-12)


def test_a_layer_called_outside_of_the_model_s_forward_folds_for_itself() -> None:
    model = adapted()
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x)
    layer = model.get_base_model().up
    layer.aflora["default"].B.data.mul_(3)
    y = layer(x)
    path = layer.aflora["default"]
    torch.testing.assert_close(y, layer.base_layer(x) + path.s_b * ((path.s_d * (x @ path.A.T)) @ path.B.T))
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 3, dtype=torch.float64))  # a forward that fails ends, too
    layer.aflora["default"].B.data.mul_(3)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3 * (y - layer.base_layer(x)))


def test_gradients_are_switched_on_inside_of_a_forward_without() -> None:
    class Inner(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x)

    torch.manual_seed(0)
    model = get_peft_model(Inner(), AFLoRAConfig(r=3, target_modules=["up"], freezable="all", freezing="never"))
    nn.init.normal_(model.base_model.model.up.aflora["default"].s_b)
    with torch.no_grad():
        y = model(torch.randn(4, 6))
    y.sum().backward()
    assert model.base_model.model.up.aflora["default"].B.grad.abs().sum() > 0


def test_a_copy_and_a_pickle_after_a_forward_stand_on_their_own() -> None:
    model = adapted()
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), model(x))
        with torch.no_grad():
            other.get_base_model().up.aflora["default"].s_b.mul_(2)
        torch.testing.assert_close(other(x), plain(other, x), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(x), plain(model, x), rtol=0, atol=1e-12)


def test_several_adapters_switching_and_unloading() -> None:
    model = adapted()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    model.add_adapter("other", AFLoRAConfig(r=2, target_modules=["up", "down"], freezable="all", freezing="never"))
    model.set_adapter("other")
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(model(x), base)  # a new adapter changes nothing
    model.set_adapter("default")
    torch.testing.assert_close(model(x), before)
    model.delete_adapter("other")
    torch.testing.assert_close(model(x), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before)
    assert not any(isinstance(m, AFLoRALayer) for m in merged.modules())
    assert not merged._forward_pre_hooks, "unloading leaves the base model as it was"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("together", [True, False])
def test_the_gradients_of_a_float32_adapter_on_a_half_precision_base_are_float32_s(
    dtype: torch.dtype, together: bool
) -> None:
    """Against Eq. 1 in float64 on the very numbers that the half-precision base works with."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    model = get_peft_model(net, AFLoRAConfig(r=4, target_modules=["0"], freezable="all", freezing="never"))
    layer = model.get_base_model()[0]
    path = layer.aflora["default"]
    nn.init.normal_(path.s_b)
    assert path.A.dtype == torch.float32
    x, upstream = torch.randn(32, 64, dtype=dtype, requires_grad=True), torch.randn(32, 48, dtype=dtype)
    with nullcontext() if together else unfolded(model):
        y = model(x)
    assert y.dtype == dtype
    ours = torch.autograd.grad(y, [path.A, path.B, path.s_d, path.s_b, x], upstream)
    exact = {n: p.detach().double().requires_grad_() for n, p in path.named_parameters()}
    wide = x.detach().double()
    change = exact["s_b"] * ((exact["s_d"] * (wide @ exact["A"].T)) @ exact["B"].T)
    expected = torch.autograd.grad(change, [exact[n] for n in ("A", "B", "s_d", "s_b")], upstream.double())
    for mine, theirs in zip(ours, expected, strict=False):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() / theirs.norm() < 1e-6
    total = layer.base_layer(x.detach()).double() + change.detach()
    torch.testing.assert_close(y.double(), total, rtol=torch.finfo(dtype).eps, atol=0)  # rounded once
    grad_x = upstream.double() @ (layer.base_layer.weight.double() + path.delta_weight().double())
    assert ours[-1].dtype == dtype
    assert (ours[-1] - grad_x).norm() / grad_x.norm() < torch.finfo(dtype).eps


@pytest.mark.parametrize("together", [True, False])
def test_autocast_around_the_backward_pass_too(together: bool) -> None:
    model = adapted(dtype=torch.float32)
    x = torch.randn(4, 6, requires_grad=True)
    with nullcontext() if together else unfolded(model):
        loss = model(x).square().sum()
        outside = gradients(loss, model)
        loss = model(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            inside = gradients(loss, model)
        with torch.autocast("cpu", torch.bfloat16):
            half = gradients(model(x).square().sum(), model)
    tolerance = {"rtol": 0.1, "atol": 0.5}  # the base layer's own backward is in bfloat16 there
    assert_same(inside, outside, **tolerance)
    assert_same(half, outside, **tolerance)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_hooked_base_layer_sees_what_it_saw(autocast: bool) -> None:
    """Input and output as without an adapter, its part not added to what the hook was given, and the gradients."""
    model = adapted(dtype=torch.float32)
    base = model.get_base_model().up.base_layer
    seen: list[Tensor] = []
    x = torch.randn(2, 4, 6, requires_grad=True)
    base.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    base.register_forward_hook(lambda module, args, output: seen.append(output))
    base.register_full_backward_hook(lambda module, grad_in, grad_out: seen.extend([grad_in[0], grad_out[0]]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with model.disable_adapter():
            model(x).sum().backward()
        without, seen[:] = list(seen), []
        model(x).sum().backward()
    for mine, theirs in zip(seen, without, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    torch.testing.assert_close(seen[:2], without[:2])


class TestCastsThatAreKept:
    def prepare(self) -> tuple[nn.Module, Tensor]:
        return adapted(dtype=torch.float32), torch.randn(4, 6)

    def assert_current(self, model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            with unfolded(model), torch.no_grad():  # where nothing is kept
                expected = model(x)
        torch.testing.assert_close(y, expected)

    def test_they_follow_their_weights(self) -> None:
        model, x = self.prepare()
        layer = model.get_base_model().up
        for change in (
            lambda: layer.base_layer.weight.data.copy_(layer.base_layer.weight.data),
            lambda: layer.base_layer.load_state_dict({n: p + 1 for n, p in layer.base_layer.state_dict().items()}),
            lambda: setattr(layer.base_layer.weight, "data", torch.randn(5, 6)),
            lambda: model.merge_adapter() or model.unmerge_adapter(),
            lambda: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(5, 6), requires_grad=False)),
            lambda: layer.base_layer.bias.add_(1),
            lambda: model.to(torch.float64).to(torch.float32),
        ):
            self.assert_current(model, x)
            with torch.no_grad():
                change()
            self.assert_current(model, x)

    def test_a_base_layer_that_begins_to_train_is_called_itself(self) -> None:
        model, x = self.prepare()
        self.assert_current(model, x)
        base = model.get_base_model().up.base_layer.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        assert base.weight.grad is not None
        assert base.bias.grad is not None

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_nothing_is_kept_where_autograd_does_not_hold_it_either(self, checkpointing: bool) -> None:
        model, x = adapted(checkpointing, dtype=torch.float32), torch.randn(4, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
            with torch.no_grad():
                model(x)
        net = model.get_base_model()
        assert net.mid._half_weight._kept is None
        assert net.up._half_weight._kept is not None

    def test_training_after_inference_mode(self) -> None:
        model, x = self.prepare()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        fresh, x = self.prepare()
        with torch.autocast("cpu", torch.bfloat16):
            fresh(x).sum().backward()
        for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)

    def test_an_input_changed_in_place_is_cast_again(self) -> None:
        model, x = self.prepare()
        with torch.autocast("cpu", torch.bfloat16):
            first = model(x)
            x.add_(1)
            second = model(x)
        assert not torch.equal(first, second)
        self.assert_current(model, x)

    def test_the_cast_of_an_input_goes_with_it(self) -> None:
        model, x = self.prepare()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(x)
            model(x + 1)
        del x
        assert cast_once._latest is None


def test_after_an_interruption_nothing_folded_is_left() -> None:
    """torch calls no hook after Ctrl-C; in a notebook other weights may be loaded then."""
    model = adapted(None)
    x = torch.randn(4, 6, dtype=torch.float64)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().down.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".s_b"):
                parameter.add_(1.0)
    torch.testing.assert_close(model(x), plain(model, x), rtol=0, atol=1e-12)
