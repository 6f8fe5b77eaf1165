"""The grammar of parameter names."""

from __future__ import annotations

import doctest

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertConfig, BertForSequenceClassification

from aflora_dist import AFLoRAConfig, names
from aflora_dist.adapter import AFLoRALayer
from aflora_dist.names import MatrixPosition, adapter_tensor, grid, is_adapter, is_head, matrix_position, of_base


def test_the_examples_hold() -> None:
    failed, tried = doctest.testmod(names)
    assert tried > 0
    assert failed == 0


def test_every_name_of_a_real_model_is_told_right() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    base = BertForSequenceClassification(config)
    own = {name for name, _ in base.named_parameters()}
    linear = {name for name, module in base.bert.named_modules() if isinstance(module, torch.nn.Linear)}
    model = get_peft_model(base, AFLoRAConfig(r=2, task_type="SEQ_CLS"))
    layers = {name for name, module in model.named_modules() if isinstance(module, AFLoRALayer)}
    assert {of_base(name).removeprefix("bert.") for name in layers} == linear - {"pooler.dense"}
    found = []
    for name, _ in model.named_parameters():
        parsed = adapter_tensor(name)
        assert is_adapter(name) == (parsed is not None)
        assert is_head(name) == ("classifier.modules_to_save" in name)
        if parsed is None:
            assert is_head(name) or of_base(name).replace(".base_layer.", ".").replace(".original_module.", ".") in own
            continue
        assert str(parsed) == name
        assert parsed.module in layers
        assert parsed.adapter == "default"
        found.append(parsed)
    assert len(found) == len(layers) * 4
    assert {tensor.tensor for tensor in found if tensor.is_matrix} == {"A", "B"}
    saved = get_peft_model_state_dict(model)
    assert sum(map(is_adapter, saved)) == len(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "base_model.model.bert.encoder.layer.3.output.dense.aflora.default.A",
            MatrixPosition("bert.encoder.layer", 3, "output.dense A"),
        ),
        (
            "base_model.model.model.layers.11.mlp.up_proj.aflora.other.B",
            MatrixPosition("model.layers", 11, "mlp.up_proj B"),
        ),
        ("base_model.model.up.aflora.other.A", MatrixPosition("", -1, "up A")),
        # Experts: the first number is the layer's.
        ("base_model.model.layers.2.experts.10.up.aflora.default.A", MatrixPosition("layers", 2, "experts.10.up A")),
        # Of no adapter: shown all the same, whatever wrote the log.
        ("layer.0.inter.A", MatrixPosition("layer", 0, "inter A")),
        ("weight", MatrixPosition("", -1, " weight")),
        # Of a model that is itself nn.Sequential, and where a layer is the block.
        ("0.attn.q.weight", MatrixPosition("", 0, "attn.q weight")),
        ("base_model.model.3.5.aflora.default.A", MatrixPosition("", 3, "5 A")),
        ("layers.7.weight", MatrixPosition("layers", 7, "weight")),
        ("base_model.model.12.aflora.default.B", MatrixPosition("", 12, "B")),
        ("layer1.0.conv2.weight", MatrixPosition("layer1", 0, "conv2 weight")),
        ("conv2.weight", MatrixPosition("", -1, "conv2 weight")),
    ],
)
def test_a_matrix_has_a_place(name: str, expected: MatrixPosition) -> None:
    assert matrix_position(name) == expected


def test_layers_are_ordered_as_numbers() -> None:
    columns, rows = grid([f"base_model.model.layers.{i}.up.aflora.default.{m}" for i in (10, 9, 2) for m in "BA"])
    assert columns == [("layers", 2), ("layers", 9), ("layers", 10)]
    assert rows == ["up A", "up B"]


def wrapped(kind: str, module: torch.nn.Module) -> torch.nn.Module:
    if kind == "checkpointing":
        return checkpoint_wrapper(module)
    if kind == "compile":
        return torch.compile(module)  # type: ignore[return-value]
    return torch.nn.DataParallel(module)


@pytest.mark.parametrize("kinds", [["checkpointing"], ["compile"], ["data parallel"], ["checkpointing", "compile"]])
def test_names_are_those_of_the_unwrapped_model_whatever_wraps_a_module(kinds: list[str]) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    model = get_peft_model(BertForSequenceClassification(config), AFLoRAConfig(r=2, task_type="SEQ_CLS"))
    model.base_model.model.module = torch.nn.Linear(2, 2)  # a name of the model's own
    plain, plain_modules = dict(model.named_parameters()), dict(model.named_modules())
    layers = model.base_model.model.bert.encoder.layer
    for kind in kinds:
        layers[0] = wrapped(kind, layers[0])
        layers[1].output.dense = wrapped(kind, layers[1].output.dense)
        model = wrapped(kind, model)
    assert any(name not in plain_modules for name, _ in model.named_modules())
    assert list(names.named_parameters(model)) == list(plain)
    assert all(names.named_parameters(model)[name] is parameter for name, parameter in plain.items())
    assert names.named_modules(model) == plain_modules
    if "data parallel" not in kinds:  # whose keys are for DataParallel models
        assert plain.keys() <= {names.unwrapped(key) for key in model.state_dict()}
