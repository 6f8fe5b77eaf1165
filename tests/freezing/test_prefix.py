"""Which parameters freeze with which block of transformers' models, and what is told of them."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from aflora_dist import AdaptiveFreezing, AFLoRAError, FreezingConfig
from aflora_dist.adapter.freezable import freezable_names
from aflora_dist.control.prefix import Prefix, blocks_from_below
from aflora_dist.engines import Engine
from aflora_dist.names import named_parameters
from tests.workers.tiny import build_base, global_batch

CONFIG = FreezingConfig(
    total_steps=12, initial_steps=2, final_steps=3, prefix=True, score="front_to_back", unit="block"
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": 40, "pad_token_id": 1}


def create(auto: Any, model_type: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = auto.from_config(AutoConfig.for_model(model_type, **{**SIZES, **options}))
    return model


def blocks_of(model: nn.Module, config: FreezingConfig = CONFIG) -> list[list[str]]:
    trained = [name for name, parameter in named_parameters(model).items() if parameter.requires_grad]
    return blocks_from_below(model, trained, freezable_names(model), config)


OPT = {"ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": True, "_remove_final_layer_norm": False}
DEBERTA = {"relative_attention": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "position_buckets": 4}
# What comes after the highest block, though it is registered before the lowest or called as what goes into it.
AFTER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "xlm-roberta": ({}, ("classifier.",)),
    "camembert": ({}, ("classifier.",)),
    "xlm-roberta-xl": ({}, ("classifier.", "roberta.encoder.LayerNorm.")),
    "xmod": ({"pre_norm": True, "languages": ["en_XX"]}, ("classifier.", "roberta.encoder.LayerNorm.")),
    "opt": (OPT, ("score.", "model.decoder.final_layer_norm.", "model.decoder.project_out.")),
    "gte": ({}, ("classifier.", "gte.pooler.")),
    "bert": ({}, ("classifier.", "bert.pooler.")),
    "mpnet": ({}, ("classifier.",)),
    "deberta-v2": (DEBERTA, ("classifier.", "pooler.")),
}


@pytest.mark.parametrize("model_type", AFTER)
def test_what_comes_after_the_blocks_trains_on_and_all_else_freezes_with_them(model_type: str) -> None:
    options, after = AFTER[model_type]
    try:
        model = create(AutoModelForSequenceClassification, model_type, **options)
    except (ValueError, KeyError) as error:
        pytest.skip(f"this transformers has no {model_type}: {error}")
    frozen = {name for block in blocks_of(model) for name in block}
    assert {name for name, _ in model.named_parameters() if not name.startswith(after)} == frozen


def test_a_head_that_trains_whole_beside_an_adapter_trains_on() -> None:
    model = create(AutoModelForSequenceClassification, "xlm-roberta")
    model = get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))  # type: ignore[arg-type]
    assert all(".lora_" in name for block in blocks_of(model) for name in block)


def test_a_parameter_of_a_block_itself_belongs_to_the_block() -> None:
    model = create(AutoModelForSequenceClassification, "bert")
    for block in model.get_submodule("bert.encoder.layer").children():
        block.register_parameter("scale", nn.Parameter(torch.ones(1, device="meta")))
    for number, names in enumerate(blocks_of(model)):
        own = [name for name in names if name.endswith(".scale")]
        assert own == [f"bert.encoder.layer.{number}.scale"]


def test_two_names_of_one_embedding_below_the_blocks_are_no_twins_and_a_head_s_is() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    below = create(AutoModelForTokenClassification, "t5", **sizes)
    aliases = [name for name, _ in below.named_parameters(remove_duplicate=False) if "shared" in name or "emb" in name]
    assert len(aliases) == 2  # or this shows nothing
    assert "transformer.shared.weight" in blocks_of(below)[0]
    more = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    with pytest.raises(AFLoRAError, match=r"one weight with lm_head\.weight"):
        blocks_of(create(AutoModelForCausalLM, "llama", **more))
    with pytest.raises(AFLoRAError, match=r"one weight with lm_head\.decoder\.weight"):  # which is registered first
        blocks_of(create(AutoModelForCausalLM, "xlm-roberta", is_decoder=True))


def test_where_all_would_freeze_the_message_says_how_to_leave_a_block() -> None:
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], bias="none", use_dora=True)
    model = get_peft_model(create(AutoModelForCausalLM, "llama", num_key_value_heads=2), lora)  # type: ignore[arg-type]
    with pytest.raises(AFLoRAError, match=r"prefix_steps=0 .*freezing\.prefix_epochs=0"):
        blocks_of(model)
    assert len(blocks_of(model, FreezingConfig(**{**vars(CONFIG), "prefix_steps": 0}))) == 2


def test_the_backward_pass_ends_at_the_block_and_not_at_what_wraps_it() -> None:
    model, ends = build_base(), []
    layers = model.bert.encoder.layer
    inside = [*layers]
    for number, layer in enumerate(inside):
        layers[number] = checkpoint_wrapper(layer)
    names = list(named_parameters(model))
    engine: Any = SimpleNamespace(model=model, trainable=names, end_backward_at=ends.append)
    prefix = Prefix(engine, [*freezable_names(model)], CONFIG)
    prefix.due(11, [name for name in prefix.blocks[1] if name in freezable_names(model)])
    prefix.due(11, [])
    assert [id(end) for end in ends] == [id(inside[1]), id(model)]


def test_what_lies_below_the_blocks_may_be_numbered_higher() -> None:
    """A model whose embeddings have stages of their own."""
    model, ends = build_base(), []
    model.bert.embeddings.stages = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(4)}) for _ in range(5))
    engine: Any = SimpleNamespace(model=model, trainable=[*named_parameters(model)], end_backward_at=ends.append)
    prefix = Prefix(engine, [*freezable_names(model)], CONFIG)
    assert "bert.embeddings.stages.4.norm.weight" in prefix.blocks[0]
    prefix.due(11, [name for name in prefix.blocks[1] if name in freezable_names(model)])
    assert [id(end) for end in ends] == [id(model.bert.encoder.layer[1])]


def test_all_that_freezes_with_a_block_is_kept_in_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 takes what does not train for the base model's."""
    kept: set[str] = set()
    monkeypatch.setattr(Engine, "keep", lambda self, names: kept.update(names))
    lora = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"], bias="all")
    model = get_peft_model(build_base(), lora)
    accelerator = Accelerator(cpu=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-3))
    freezing = AdaptiveFreezing(accelerator, model, optimizer, CONFIG)
    for step in range(12):
        accelerator.backward(model(**global_batch(step)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert any(name.endswith("LayerNorm.bias") for name in freezing.frozen)
    assert kept >= {*freezing.frozen}


def test_a_model_whose_lowest_block_has_frozen_is_copied_and_pickled() -> None:
    model = build_base()
    engine: Any = SimpleNamespace(
        model=model, trainable=[*named_parameters(model)], end_backward_at=lambda module: None
    )
    prefix = Prefix(engine, [*freezable_names(model)], CONFIG)
    prefix.due(11, [name for name in prefix.blocks[1] if name in freezable_names(model)])
    file = io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    batch = global_batch(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(**batch).loss, model(**batch).loss)
