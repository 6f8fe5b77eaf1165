"""A user's own models and loops, on one process: what torch allows and no model of a library does."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from aflora_dist import AdaptiveFreezing, AFLoRAConfig, AFLoRAError, FreezingConfig
from aflora_dist.adapter.freezable import freezable_names
from tests.workers.tiny import build_base

STEPS = 12
CONFIG: dict[str, Any] = {"total_steps": STEPS, "initial_steps": 2, "final_steps": 3}
LAYERS = r"layers\.\d\.weight"


class Net(nn.Module):
    """Three layers and a head, which is registered first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class Blocks(nn.Module):
    """Four blocks, and a head, which is registered first."""

    def __init__(self, own_checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own_checkpointing = own_checkpointing
        self.classifier, self.embed = nn.Linear(8, 2), nn.Embedding(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.argmax(-1))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=True) if self.own_checkpointing else block(h)
        return self.classifier(self.norm(h))


class Loop:
    """`every` is called before each forward pass, with the step."""

    def __init__(self, model: nn.Module, *, clip: float | None = None, **options: Any) -> None:
        freezable = options.pop("freezable", None)
        self.accelerator, self.clip = Accelerator(cpu=True), clip
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        config = FreezingConfig(**CONFIG | options)
        self.freezing = AdaptiveFreezing(self.accelerator, self.model, self.optimizer, config, freezable=freezable)
        self.moved: list[set[str]] = []

    def train(self, every: Callable[[int], None] = lambda step: None, start: int = 0, stop: int = STEPS) -> None:
        for step in range(start, stop):
            every(step)
            before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            torch.manual_seed(step)
            self.accelerator.backward(self.model(torch.randn(4, 8)).pow(2).mean())
            if self.clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.moved.append({n for n, p in self.model.named_parameters() if not torch.equal(p, before[n])})


@pytest.mark.parametrize("name", ["head.weight", "layers.1.weight"])
def test_what_is_switched_off_for_a_while_trains_on_though_others_freeze_meanwhile(name: str) -> None:
    loop = Loop(Net(), freezable=r"layers\.[02]\.weight" if name == "layers.1.weight" else LAYERS)
    parameter = loop.model.get_parameter(name)

    def switch(step: int) -> None:
        parameter.requires_grad_(not 4 <= step < 8)

    loop.train(switch)
    assert any(4 <= event.step < 8 for event in loop.freezing.events), "a freeze within that time"
    assert [name in moved for moved in loop.moved] == [not 4 <= step < 8 for step in range(STEPS)]
    parameter.requires_grad_(False)
    tensors, record = loop.freezing.progress.snapshot()
    assert f"value/{name}" in tensors
    loop.freezing.progress.restore(tensors, record)
    assert not parameter.requires_grad


def test_a_freezable_matrix_that_is_off_when_others_freeze_ends_nothing() -> None:
    loop = Loop(Net(), freezable=LAYERS)
    last = loop.model.layers[2].weight

    def switch(step: int) -> None:
        last.requires_grad_(step % 2 == 0)

    loop.train(switch)
    assert len(loop.freezing.frozen) == 3


def test_two_adapters_are_trained_in_turn_with_one_optimizer() -> None:
    config = LoraConfig(r=2, target_modules=["0", "1", "2"])
    model = get_peft_model(Net(), config)
    model.add_adapter("b", config)
    model.base_model.model.head.requires_grad_(True)
    model.base_model.set_adapter(["default", "b"])
    loop = Loop(model)
    loop.train(lambda step: model.set_adapter(["default", "b"][step % 2]))
    assert loop.freezing.step == STEPS
    assert {*loop.freezing.frozen} == {*loop.freezing.freezable}


class Lists(nn.Module):
    """Weights of modules that are never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(2))
        self.read, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for weight in (*self.weights, self.read.weight):
            x = torch.tanh(x @ weight)
        return self.head(x)


@pytest.mark.parametrize(("model", "freezable"), [(Net, LAYERS), (Lists, r"weights\.\d|read\.weight")])
def test_what_is_switched_on_after_its_freeze_neither_trains_nor_counts_in_clipping(
    model: Callable[[], nn.Module], freezable: str
) -> None:
    plain, switched = (Loop(model(), freezable=freezable, clip=0.01) for _ in range(2))
    plain.train()

    def switch(step: int) -> None:
        switched.model.requires_grad_(True)

    switched.train(switch)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(switched.model.state_dict()[name], value), name


def test_what_is_appended_to_a_group_stays_in_it_and_what_the_model_had_not_is_not_saved_in_silence() -> None:
    model = Net()
    late = [*model.head.parameters()]
    model.head.requires_grad_(False)
    loop = Loop(model, freezable=LAYERS)
    model.head.requires_grad_(True)
    loop.optimizer.param_groups[0]["params"].extend(late)
    loop.train()
    assert all({"head.weight", "head.bias"} <= moved for moved in loop.moved)
    tensors, record = loop.freezing.progress.snapshot()
    value = model.head.weight.detach().clone()
    loop.train(start=STEPS, stop=STEPS + 1)
    loop.freezing.progress.restore(tensors, record)
    assert torch.equal(model.head.weight, value)
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(AFLoRAError, match=r"a parameter of \(3,\) that the model did not have"):
        loop.freezing.progress.snapshot()


def test_freezings_of_parts_of_one_model_have_a_file_each(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), nn.ModuleList([Net(), Net()])
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in model]
    model, *prepared = accelerator.prepare(model, *optimizers)
    freezings = [
        AdaptiveFreezing(accelerator, part, optimizer, FreezingConfig(**CONFIG), freezable=LAYERS)
        for part, optimizer in zip(model, prepared, strict=True)
    ]
    for step in range(6):
        torch.manual_seed(step)
        loss = sum(part(torch.randn(4, 8)).pow(2).mean() * (i + 1) for i, part in enumerate(model))
        accelerator.backward(loss)
        for optimizer in prepared[: 1 if step < 3 else 2]:
            optimizer.step()
        for optimizer in prepared:
            optimizer.zero_grad()
    frozen = [freezing.frozen for freezing in freezings]
    assert frozen[0] != frozen[1]
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert [freezing.frozen for freezing in freezings] == frozen


def test_a_head_that_is_registered_first_does_not_freeze_with_the_lowest_block() -> None:
    options = {"prefix": True, "score": "front_to_back", "unit": "block", "freezable": r"blocks\.\d\.0\.weight"}
    loop = Loop(Blocks(), **options)
    loop.train()
    assert "embed.weight" in loop.freezing.frozen
    assert not any(name.startswith("classifier") for name in loop.freezing.frozen)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Linear(32, 2)
            self.backbone = build_base().bert

        def forward(self, x: Tensor) -> Tensor:
            return self.value(self.backbone(input_ids=x.argmax(-1, keepdim=True)).last_hidden_state[:, 0])

    around = Loop(Around(), **options | {"freezable": r"backbone.*(query|value)\.weight"})
    around.train()
    assert any("embeddings" in name for name in around.freezing.frozen)
    assert not any(name.startswith("value.") for name in around.freezing.frozen)


def test_a_model_that_checkpoints_by_itself_is_told_when_a_block_has_no_gradient(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"prefix": True, "score": "front_to_back", "unit": "block", "freezable": r"blocks\.\d\.0\.weight"}
    Loop(Blocks(own_checkpointing=True), **options).train()
    assert "has had no gradient since the block below it froze" in capsys.readouterr().err


def test_layers_freeze_from_the_front_by_number_and_stacks_in_their_order() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(11))
            self.second = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.first, *self.second):
                x = torch.tanh(layer(x))
            return x

    loop = Loop(Stacked(), score="front_to_back", freezable=r".*weight", final_steps=1)
    loop.train()
    order = [name for event in loop.freezing.events for name in event.frozen]
    assert order == [n for n, _ in loop.model.named_parameters() if n.endswith("weight")]


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_what_has_no_score_is_refused_in_a_sentence(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 8, sparse=kind == "sparse")
            self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.table(x.argmax(-1)) * self.phase).abs()

    model, accelerator = Odd(), Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    config, freezable = FreezingConfig(**CONFIG), ["phase" if kind == "complex" else "table.weight"]

    def train() -> None:
        AdaptiveFreezing(accelerator, model, optimizer, config, freezable=freezable)
        accelerator.backward(model(torch.randn(4, 8)).sum())
        optimizer.step()

    with pytest.raises(AFLoRAError, match=f"is {kind}"):
        train()


def test_matrices_of_float64_are_scored_by_the_matrix() -> None:
    loop = Loop(Net(), freezable=LAYERS, granularity="matrix")
    double = Loop(Net().double(), freezable=LAYERS, granularity="matrix")
    double.model.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    loop.train()
    double.train()
    assert double.freezing.frozen == loop.freezing.frozen


def test_a_loop_that_is_longer_than_it_said_trains_what_was_to_train_to_the_end() -> None:
    model = Net()
    model.head.requires_grad_(False)
    for layer in model.layers:
        layer.bias.requires_grad_(False)
    loop = Loop(model, freezable=LAYERS, final_steps=0)
    loop.train(stop=STEPS + 3)
    assert len(loop.freezing.remaining) == 1


def test_an_error_of_on_freeze_that_a_loop_outlives_stops_no_clock() -> None:
    loop = Loop(Net(), freezable=LAYERS)

    def fails(event: Any) -> None:
        raise OSError("full")

    loop.freezing.on_freeze = fails
    for step in range(STEPS):
        try:
            loop.train(start=step, stop=step + 1)
        except OSError:
            loop.optimizer.zero_grad()
    assert loop.freezing.step == STEPS


# -- AFLoRA in modules that torch reads past ----------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.unsqueeze(1)))


def adapted(model: nn.Module, targets: list[str], **options: Any) -> Any:
    config = AFLoRAConfig(r=2, target_modules=targets, freezable="all", init_weights=False, **options)
    return get_peft_model(model, config)


def test_torch_s_encoder_is_evaluated_with_its_adapter() -> None:
    model, x = adapted(Encoder(), ["linear1", "linear2"]).eval(), torch.randn(4, 8)
    with torch.no_grad():
        found, expected = model(x), copy.deepcopy(model).merge_and_unload()(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        with model.disable_adapter():
            assert (model(x) - found).abs().max() > 1e-2


def test_torch_s_attention_is_no_target() -> None:
    with pytest.raises(AFLoRAError, match=r"out_proj' belongs to torch's nn\.MultiheadAttention"):
        adapted(Encoder(), ["out_proj"])


def test_torch_s_own_encoder_freezes_whole() -> None:
    """Attention there holds its first projections as bare parameters, and feed-forward layers lie in the block."""
    model = Encoder()
    matrices = {name for name, p in model.named_parameters() if name.startswith("encoder") and p.dim() == 2}
    assert len(matrices) == 8
    assert freezable_names(model) == matrices

    adapter = get_peft_model(Encoder(), AFLoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    assert len(freezable_names(adapter)) == 8, "of both feed-forward layers of two blocks, A and B"


def test_a_parametrized_layer_is_the_layer_that_it_was() -> None:
    model = Encoder()
    for block in model.encoder.layers:
        nn.utils.parametrizations.weight_norm(block.linear1)
        nn.utils.parametrizations.orthogonal(block.linear2)
    found = freezable_names(model)
    assert {n.partition("layers.")[2] for n in found if "0." in n and "attn" not in n} == {
        "0.linear1.parametrizations.weight.original0",
        "0.linear1.parametrizations.weight.original1",
        "0.linear2.parametrizations.weight.original",
    }
    loop = Loop(model, unit="layer", freezable=r".*layers.*linear\d.*")
    loop.train()
    together = [{n.split(".")[3] for n in event.frozen} for event in loop.freezing.events]
    assert len(loop.freezing.frozen) == 10, "with biases: 3 of linear1, 2 of linear2"
    assert all(
        {n for n in loop.freezing.freezable if n.split(".")[:4] == f.split(".")[:4]} <= {*e.frozen}
        for e in loop.freezing.events
        for f in e.frozen
    ), together


@pytest.mark.parametrize("way", ["sequential", "layers"])
def test_blocks_of_a_model_that_is_a_sequence_and_layers_that_are_blocks_freeze_from_the_bottom(way: str) -> None:
    if way == "layers":
        model, freezable, of_block = Net(), LAYERS, "layers.{}."
    else:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)]
        model, freezable, of_block = nn.Sequential(*blocks, nn.Linear(8, 2)), r"[0-2]\.[02]\.weight", "{}."
    loop = Loop(model, freezable=freezable, prefix=True, unit="block", score="front_to_back")
    loop.train()
    events = loop.freezing.events
    assert [event.backward_from for event in events if event.backward_from][-1] == 3
    for number in range(3):
        block = {n for n, _ in loop.model.named_parameters() if n.startswith(of_block.format(number))}
        assert block <= {*loop.freezing.frozen}
        matrices = block & {*loop.freezing.freezable}
        assert len({loop.freezing.frozen[name] for name in matrices}) == 1, "all of a block at once"
    assert not [name for name in loop.freezing.frozen if name.startswith(("head", "3"))]
    x = torch.randn(4, 8, requires_grad=True)
    loop.model(x).sum().backward()
    assert loop.freezing.engine.trainable == [n for n, p in loop.model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_what_comes_out_of_a_layer_may_be_written_to(layer: Any, hooked: bool, adapters: int) -> None:
    class Written(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.relu, self.before = layer(8, 8), nn.ReLU(inplace=in_place), nn.Linear(8, 8)
            if hooked:
                self.up.register_forward_hook(lambda *args: None)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(self.before(x))
            return self.relu(h)

    gradients = []
    for in_place in (True, False):
        model = adapted(Written(in_place), ["up"], freezing="never")
        if adapters == 2:
            model.add_adapter("b", AFLoRAConfig(r=3, target_modules=["up"], freezing="never", freezable="all"))
            model.base_model.set_adapter(["default", "b"])
        torch.manual_seed(1)
        model(torch.randn(2, 3, 8)).pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_part_that_is_recomputed_by_itself_takes_the_weights_of_its_own_forward(use_reentrant: bool) -> None:
    """After a forward pass of the whole model, and an update since."""
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = adapted(Net(), ["0", "1"], freezing="never")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(torch.randn(4, 8)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        part, x = model.base_model.model.layers[0], torch.randn(4, 8, requires_grad=True)
        out = checkpoint(part, x, use_reentrant=use_reentrant) if recomputed else part(x)
        out.pow(2).sum().backward()
        gradients.append({n: p.grad for n, p in part.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("way", ["copied", "read from a file"])
def test_a_copy_of_a_model_that_is_being_frozen_is_frozen_by_nobody(way: str) -> None:
    loop = Loop(adapted(Net(), ["0", "1"], modules_to_save=["head"]))
    loop.train(stop=4)
    if way == "copied":
        twin = copy.deepcopy(loop.model)
    else:
        torch.save(loop.model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin(torch.randn(4, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="nothing freezes it"):
        twin(torch.randn(4, 8)).sum().backward()
    Loop(twin, initial_steps=1).train(stop=2)


def test_a_freezing_that_is_gone_watches_nothing() -> None:
    """As where Ctrl-C has ended a training, and its objects went with it."""
    model = adapted(Net(), ["0", "1"], modules_to_save=["head"])
    loop = Loop(model)
    loop.train(stop=3)
    loop.freezing.engine.unwatch()
    del loop
    gc.collect()
    model(torch.randn(4, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="nothing freezes it"):
        model(torch.randn(4, 8)).sum().backward()
    Loop(model).train(stop=2)


def test_an_adapter_may_be_deleted_after_some_of_it_has_frozen() -> None:
    model = adapted(Net(), ["0", "1"], modules_to_save=["head"])
    model.add_adapter("b", AFLoRAConfig(r=2, target_modules=["2"], freezable="all"))
    model.base_model.set_adapter(["default", "b"])
    loop = Loop(model)
    loop.train(stop=8)
    assert any(".default." in name for name in loop.freezing.frozen)
    loop.model.delete_adapter("default")
    loop.model.set_adapter("b")
    loop.train(start=8)
    assert loop.freezing.step == STEPS


def test_averages_that_are_swapped_in_for_an_evaluation_by_data_are_seen_in_half_precision() -> None:
    """As helpers for moving averages do, of all parameters: frozen ones, too, whose cast is kept."""
    model = adapted(Net(), ["0", "1", "2"], freezing="always")
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
        model.eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.data.copy_(-3 * parameter.data)
        with torch.no_grad():
            model.train()
            model.eval()
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


def test_an_adapter_that_no_gradient_reaches_is_told_of_before_it_freezes(capsys: pytest.CaptureFixture[str]) -> None:
    class Reads(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(nn.functional.linear(x, self.layers[0].weight))  # past the adapter
            return self.head(torch.tanh(self.layers[1](x)))

    Loop(adapted(Net(), ["0", "1"], modules_to_save=["head"])).train()
    assert "have had no gradient" not in capsys.readouterr().err
    Loop(adapted(Reads(), ["0", "1"], modules_to_save=["head"])).train()
    said = capsys.readouterr().err
    assert "layers.0.aflora.default.A and 1 more have had no gradient so far, and freeze first" in said


def test_other_values_in_the_place_of_what_has_frozen_have_their_gradients() -> None:
    """torch.func's: fast weights of meta-learning, gradients by example, a Hessian."""
    loop = Loop(Net(), freezable=LAYERS)
    loop.train()
    model, x = loop.model, torch.randn(4, 8)
    expected = copy.deepcopy(model).requires_grad_(True)
    expected(x).pow(2).mean().backward()

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).pow(2).mean()

    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss(values).backward()
    transformed = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(values[name].grad, parameter.grad)
        torch.testing.assert_close(transformed[name], parameter.grad)
    model.requires_grad_(True)
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {*loop.freezing.frozen}


def test_a_step_that_is_compiled_freezes_what_another_one_does() -> None:
    frozen, values = [], []
    for compiled in (False, True):
        model = Net()
        accelerator, optimizer = Accelerator(cpu=True), torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
        model, optimizer = accelerator.prepare(model, optimizer)
        freezing = AdaptiveFreezing(accelerator, model, optimizer, FreezingConfig(**CONFIG), freezable=LAYERS)

        def update() -> None:
            model(torch.randn(4, 8)).pow(2).mean().backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        step = torch.compile(update, backend="eager") if compiled else update
        torch.manual_seed(1)
        for _ in range(STEPS):
            step()
        frozen.append(freezing.frozen)
        values.append([*model.parameters()])
        assert freezing.step == STEPS
    torch._dynamo.reset()
    assert len(frozen[0]) == 3
    assert frozen[0] == frozen[1]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)


def test_a_module_that_stands_under_two_names_freezes() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.layers[0]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.tanh(self.again(x)))

    loop = Loop(Twice(), freezable=["layers.0.weight", "layers.1.weight", "again.weight"])
    loop.train()
    assert {*loop.freezing.frozen} == {"layers.0.weight", "layers.1.weight"}
    assert not loop.model.again.weight.requires_grad


def test_torch_s_encoder_with_padding_is_evaluated_with_its_adapter() -> None:
    class Padded(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(4, 3, dtype=torch.bool)
            padding[:, 2] = True
            return self.head(self.encoder(x.unsqueeze(1).repeat(1, 3, 1), src_key_padding_mask=padding)[:, 0])

    model, x = adapted(Padded(), ["linear1", "linear2"]).eval(), torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), copy.deepcopy(model).merge_and_unload()(x), rtol=0, atol=1e-5)


def test_an_optimizer_beside_the_one_that_was_given_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(Net(), freezable=LAYERS)
    head = torch.optim.SGD(loop.model.head.parameters(), lr=0.1)
    loop.train(lambda step: head.step(), stop=3)
    assert "Another optimizer" not in capsys.readouterr().err  # it updates nothing that is to freeze
    second = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    for _ in range(2):
        second.step()
    said = capsys.readouterr().err
    assert said.count("Another optimizer than the one that AdaptiveFreezing was given updates layers.") == 1
    loop.freezing.detach()
    torch.optim.SGD(loop.model.parameters(), lr=0.1).step()
    assert "Another optimizer" not in capsys.readouterr().err


class Twice(torch.optim.SGD):
    """An optimizer that leaves its updates to another one."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.inner = torch.optim.SGD(self.param_groups, **options)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimizer_within_the_one_that_was_given_is_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    model, accelerator = Net(), Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, Twice(model.parameters(), lr=0.1))
    freezing = AdaptiveFreezing(accelerator, model, optimizer, FreezingConfig(**CONFIG), freezable=LAYERS)
    for _ in range(STEPS):
        accelerator.backward(model(torch.randn(4, 8)).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    assert len(freezing.frozen) == 3
    assert "Another optimizer" not in capsys.readouterr().err


def test_a_freezing_that_comes_to_its_end_within_another_s_step_disturbs_nobody() -> None:
    def collect(*_: Any) -> None:
        gc.collect()

    handle = register_optimizer_step_pre_hook(collect)
    try:
        for _ in range(3):
            loop = Loop(Net(), freezable=LAYERS)
            loop.train(stop=2)
            loop.loop = loop  # type: ignore[attr-defined] # only the collector finds it
            del loop
            parameter = nn.Parameter(torch.zeros(2))
            parameter.grad = torch.ones(2)
            torch.optim.SGD([parameter], lr=0.1).step()
    finally:
        handle.remove()
