"""What PEFT's users may do with any method, done with this one on several architectures."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from aflora_dist import AFLoRAConfig
from aflora_dist.adapter import AFLoRALayer
from aflora_dist.adapter.layer import AFLoRALinear
from aflora_dist.compat.contract import is_older
from aflora_dist.compat.transformers import checkpoint_activations
from aflora_dist.errors import AFLoRAError
from tests.small import add_by_transformers

TOKENS = torch.arange(3, 15).view(2, 6)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40}
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), "SEQ_CLS"),
    "deberta-v2": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL)), "SEQ_CLS"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)), "CAUSAL_LM"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40)), "CAUSAL_LM"),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_ff=24, num_layers=2, d_kv=4, num_heads=4, vocab_size=40, decoder_start_token_id=0)
        ),
        "SEQ_2_SEQ_LM",
    ),
}
GENERATING = ["llama", "gpt2", "t5"]
each = pytest.mark.parametrize("kind", MODELS)


def base(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def config(kind: str, **options: Any) -> AFLoRAConfig:
    return AFLoRAConfig(**{"r": 2, "freezing": "never", "task_type": MODELS[kind][1], "init_weights": False, **options})


def adapted(kind: str, **options: Any) -> PeftModel:
    """A model whose adapter changes it."""
    model = base(kind)
    torch.manual_seed(1)
    return get_peft_model(model, config(kind, **options)).eval()


def inputs(kind: str) -> dict[str, Tensor]:
    return {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS[:, :4]} if kind == "t5" else {})


@torch.no_grad()
def logits(model: Any, kind: str, **options: Any) -> Tensor:
    return model(**inputs(kind), **options).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def layers_of(model: nn.Module) -> dict[str, AFLoRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AFLoRALayer)}


# -- saving and loading ------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}], ids=str)
@pytest.mark.parametrize("safetensors", [True, False])
def test_saved_and_loaded_it_computes_the_same(kind: str, options: Any, safetensors: bool, tmp_path: Path) -> None:
    model = adapted(kind)
    assert not torch.allclose(logits(model, kind), logits(base(kind), kind))
    model.save_pretrained(tmp_path, safe_serialization=safetensors)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path, **options).eval()
    close(logits(loaded, kind), logits(model, kind), 0)
    assert not any(p.is_meta for p in loaded.parameters())


@each
def test_files_hold_four_tensors_a_layer_without_the_adapter_s_name(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "modules_to_save" not in name}
    heads = {name for name in names if ".aflora." not in name}
    assert names - heads == {f"{layer}.aflora.{t}" for layer in layers_of(model) for t in ("A", "B", "s_d", "s_b")}
    assert all("classifier" in name or "pooler" in name for name in heads)


@each
def test_transformers_own_way_of_adding_saving_and_loading(kind: str, tmp_path: Path) -> None:
    model: Any = base(kind)
    torch.manual_seed(1)
    add_by_transformers(model, config(kind))
    changed = logits(model.eval(), kind)
    assert not torch.allclose(changed, logits(base(kind), kind))
    model.save_pretrained(tmp_path)
    loaded: Any = base(kind)
    if is_older("transformers", "5.18"):
        with pytest.raises(AFLoRAError, match=r"PeftModel\.from_pretrained"):
            loaded.load_adapter(str(tmp_path))
        return
    loaded.load_adapter(str(tmp_path))
    close(logits(loaded.eval(), kind), changed, 0)
    loaded.disable_adapters()
    close(logits(loaded, kind), logits(base(kind), kind), 0)
    loaded.enable_adapters()
    close(logits(loaded, kind), changed, 0)
    assert loaded.active_adapters() == ["default"]


@each
def test_layers_are_found_by_a_state_dict(kind: str) -> None:
    model = adapted(kind, task_type=None)
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    injected = inject_adapter_in_model(config(kind), base(kind), state_dict=state)
    assert {f"base_model.model.{name}" for name in layers_of(injected)} == {*layers_of(model)}
    found = set_peft_model_state_dict(injected, state)
    assert not found.unexpected_keys
    close(logits(injected.eval(), kind), logits(model, kind), 0)


@each
def test_folder_and_card_name_the_package(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(kind))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["import_first"] == "aflora_dist"
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["import_first"] == "aflora_dist"
    card = (tmp_path / "README.md").read_text()
    assert card.count("import aflora_dist") == 1
    assert "library_name: peft" in card


def test_adapters_of_before_the_package_was_named_load(tmp_path: Path) -> None:
    model = adapted("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    del written["import_first"]
    path.write_text(json.dumps(written))
    close(logits(PeftModel.from_pretrained(base("bert"), tmp_path).eval(), "bert"), logits(model, "bert"), 0)


# -- merging, unloading, switching -------------------------------------------------------------------------


@each
def test_merging_unloading_and_disabling(kind: str) -> None:
    plain, model = logits(base(kind), kind), adapted(kind, task_type=None)
    changed = logits(model, kind)
    for _ in range(2):
        model.merge_adapter()
        close(logits(model, kind), changed)
        model.unmerge_adapter()
        close(logits(model, kind), changed)
    with model.disable_adapter():
        close(logits(model, kind), plain)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    close(logits(merged, kind), changed)
    unloaded = model.unload()
    close(logits(unloaded, kind), plain)
    for bare in (merged, unloaded):
        assert not layers_of(bare)
        assert {*bare.state_dict()} == {*base(kind).state_dict()}
        assert not any(module._forward_pre_hooks for module in bare.modules())


@each
def test_several_adapters_at_once_add_up(kind: str) -> None:
    model = adapted(kind, task_type=None)
    torch.manual_seed(2)
    model.add_adapter("second", config(kind, r=3, task_type=None))
    first = logits(model, kind)
    model.set_adapter("second")
    second = logits(model, kind)
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, kind)
    layers = layers_of(model)
    total = {name: sum(layer.get_delta_weight(a) for a in layer.active_adapters) for name, layer in layers.items()}
    model.merge_adapter()
    close(logits(model, kind), both)
    model.unmerge_adapter()
    plain = model.unload()
    with torch.no_grad():
        for name, change in total.items():
            plain.get_submodule(name.removeprefix("base_model.model.")).weight += change
    close(logits(plain, kind), both)


@each
def test_a_deleted_adapter_is_gone_and_its_name_is_free(kind: str) -> None:
    model = adapted(kind, task_type=None)
    first = logits(model, kind)
    model.add_adapter("second", config(kind, task_type=None))
    model.set_adapter("second")
    model.delete_adapter("second")
    assert not any(".second." in name for name in model.state_dict())
    model.set_adapter("default")
    close(logits(model, kind), first, 0)
    model.add_adapter("second", config(kind, r=4, task_type=None))
    assert {layer.r["second"] for layer in layers_of(model).values()} == {4}
    model.delete_adapter("default")
    assert model.base_model.active_adapters == ["second"]
    model.delete_adapter("second")
    close(logits(model.base_model.model, kind), logits(base(kind), kind), 0)


@each
def test_only_the_active_adapter_trains(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(kind))

    def training() -> set[str]:
        names = (n for n, p in model.named_parameters() if p.requires_grad and ".aflora." in n)
        return {name.split(".aflora.")[1].split(".")[0] for name in names}

    assert training() == {"default"}
    model.set_adapter("second")
    assert training() == {"second"}
    model.set_adapter("default", inference_mode=True)
    assert training() == set()
    model.set_requires_grad("second")
    assert training() == {"second"}


def test_all_linear_finds_the_same_layers_for_a_second_adapter() -> None:
    model = adapted("bert", target_modules="all-linear", freezable="all")
    first = {*layers_of(model)}
    assert len(first) == 13
    model.add_adapter("second", config("bert", target_modules="all-linear", freezable="all"))
    assert {name for name, layer in layers_of(model).items() if "second" in layer.aflora} == first
    assert all(type(layer) is AFLoRALinear for layer in layers_of(model).values())


# -- mixed batches -----------------------------------------------------------------------------------------


def mixed(kind: str) -> PeftModel:
    model = adapted(kind, task_type=None if kind != "bert" else "SEQ_CLS")
    torch.manual_seed(2)
    model.add_adapter(
        "second", config(kind, r=3, target_modules=None, task_type=model.peft_config["default"].task_type)
    )
    return model.eval()


@each
def test_a_batch_may_mix_adapters(kind: str) -> None:
    model = mixed(kind)
    wanted = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted[name] = logits(model, kind)
    with model.disable_adapter():
        wanted["__base__"] = logits(model, kind)
    for names in (["second", "default"], ["__base__", "second"], ["default", "default"], ["__base__", "__base__"]):
        found = logits(model, kind, adapter_names=names)
        for i, name in enumerate(names):
            close(found[i], wanted[name][i])
    close(logits(model, kind), wanted["second"], 0)  # nothing is left behind


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", GENERATING)
def test_mixed_batches_generate(kind: str, beams: int) -> None:
    model = mixed(kind)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    options |= {"pad_token_id": 0, "eos_token_id": 39}
    mask = torch.ones_like(TOKENS)
    both = model.generate(input_ids=TOKENS, attention_mask=mask, adapter_names=["second", "default"], **options)
    for i, name in enumerate(["second", "default"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=TOKENS, attention_mask=mask, **options)
        assert both[i].tolist() == alone[i].tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_mixed_where_a_model_lays_examples_and_positions_end_to_end(beams: int) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    base = OPTForCausalLM(OPTConfig(**size, word_embed_proj_dim=32, max_position_embeddings=32, dropout=0.0))
    seen: list[int] = []
    base.model.decoder.layers[0].fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dim()))
    model = get_peft_model(base, AFLoRAConfig(task_type="CAUSAL_LM", init_weights=False, target_modules=["fc1", "fc2"]))
    model.add_adapter("second", AFLoRAConfig(init_weights=False, r=3, target_modules=["fc1", "q_proj"]))
    model.eval()
    names, options = ["second", "default"], {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    options |= {"attention_mask": torch.ones_like(TOKENS), "pad_token_id": 0, "eos_token_id": 39}
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=names).logits
        written = model.generate(input_ids=TOKENS, adapter_names=names, **options)
        assert 2 in seen, "not a case: this model keeps examples apart"
        for i, name in enumerate(names):
            model.set_adapter(name)
            close(mixed[i], model(input_ids=TOKENS).logits[i])
            assert written[i].tolist() == model.generate(input_ids=TOKENS, **options)[i].tolist()


def test_peft_s_switch_for_casting_inputs_changes_nothing() -> None:
    model = adapted("bert")
    expected = logits(model, "bert")
    with disable_input_dtype_casting(model):
        close(logits(model, "bert"), expected, 0)
    assert all(layer.cast_input_dtype_enabled for layer in layers_of(model).values())


def test_the_configuration_s_signature_names_its_fields() -> None:
    class Wider(AFLoRAConfig):
        pass

    for kind in (AFLoRAConfig, Wider):
        assert [*inspect.signature(kind).parameters] == [field.name for field in dataclasses.fields(kind) if field.init]
        with pytest.raises(AFLoRAError, match="has no lora_alpha"):
            kind(lora_alpha=8)


def test_mixed_batches_that_cannot_be_are_refused() -> None:
    model = mixed("bert")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        logits(model, "bert", adapter_names=["third", "default"])
    with pytest.raises(ValueError, match="3 names and 2 examples"):
        logits(model, "bert", adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="inference only"):
        logits(model.train(), "bert", adapter_names=["default"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        logits(model, "bert", adapter_names=["default"] * 2)
    assert not any(layer._forward_pre_hooks for layer in layers_of(model).values())


# -- weights -----------------------------------------------------------------------------------------------


@each
def test_init_weights_false_is_finite_seeded_and_changes_the_model(kind: str) -> None:
    states = [get_peft_model_state_dict(adapted(kind)) for _ in range(2)]
    assert all(value.isfinite().all() for value in states[0].values())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.allclose(logits(adapted(kind), kind), logits(base(kind), kind))
    untouched = logits(get_peft_model(base(kind), config(kind, init_weights=True)).eval(), kind)
    close(untouched, logits(base(kind), kind), 0)


@each
@pytest.mark.parametrize("autocast", [True, False])
def test_the_adapter_of_a_half_precision_model(kind: str, autocast: bool) -> None:
    torch.manual_seed(1)
    model = get_peft_model(base(kind).to(torch.bfloat16), config(kind), autocast_adapter_dtype=autocast).eval()
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if ".aflora." in n} == {dtype}
    assert {layer.get_delta_weight("default").dtype for layer in layers_of(model).values()} == {dtype}
    has_head = any(".modules_to_save." in name for name, _ in model.named_parameters())
    assert logits(model, kind).dtype == (dtype if has_head else torch.bfloat16)  # a head trains in float32
    _, state = peft.convert_to_lora(model, rank=2)
    assert {value.dtype for name, value in state.items() if "lora_" in name} == {dtype}


@each
def test_peft_converts_it_to_lora(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, task_type=None)
    peft.save_as_lora(tmp_path, model, rank=2)
    loaded = PeftModel.from_pretrained(base(kind), tmp_path).eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    close(logits(loaded, kind), logits(model, kind), 1e-4)


@pytest.mark.parametrize("kind", GENERATING)
def test_tied_weights_stay_tied(kind: str, tmp_path: Path) -> None:
    def tied() -> PreTrainedModel:
        model = base(kind)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    torch.manual_seed(1)
    model = get_peft_model(tied(), config(kind)).eval()
    changed = logits(model, kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied(), tmp_path).eval()
    close(logits(loaded, kind), changed, 0)
    merged = loaded.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    close(logits(merged, kind), changed)


@each
def test_modules_to_save_train_switch_and_are_saved(kind: str, tmp_path: Path) -> None:
    head = {"bert": "pooler", "deberta-v2": "pooler", "llama": "norm", "gpt2": "ln_f", "t5": "lm_head"}[kind]
    model = adapted(kind, modules_to_save=[head])
    module = next(m for n, m in model.named_modules() if n.endswith(f"{head}.modules_to_save.default"))
    assert all(p.requires_grad for p in module.parameters())
    plain = logits(model, kind)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    changed = logits(model, kind)
    assert not torch.allclose(plain, changed)
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(base(kind), tmp_path).eval(), kind), changed, 0)
    close(logits(model.merge_and_unload(), kind), changed)


@pytest.mark.parametrize("bias", ["all", "aflora_only"])
def test_biases_train_and_are_saved(bias: str, tmp_path: Path) -> None:
    model = adapted("bert", bias=bias)
    biases = {n: p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert biases
    with torch.no_grad():
        for parameter in biases.values():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("bert"), tmp_path).eval()
    close(logits(loaded, "bert"), logits(model, "bert"), 0)


# -- running it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GENERATING)
def test_it_generates_what_the_merged_model_generates(kind: str) -> None:
    model = adapted(kind)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}
    mine = model.generate(input_ids=TOKENS, **options)
    assert mine.tolist() == model.generate(input_ids=TOKENS, **options).tolist()
    assert mine.tolist() == model.merge_and_unload().generate(TOKENS, **options).tolist()


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted(kind).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            checkpoint_activations(model, use_reentrant=reentrant)
            model.enable_input_require_grads()
        torch.manual_seed(4)
        model(**inputs(kind)).logits.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert {*expected} == {name for name in found if "shared" not in name}
    assert any(".aflora." in name for name in expected)
    for name, gradient in expected.items():
        close(found[name], gradient)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_traced_model_can_be_saved(kind: str) -> None:
    model = adapted(kind).eval()
    if kind != "bert":
        model.get_base_model().config.use_cache = False
    expected = logits(model, kind)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(input_ids=tokens).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), TOKENS, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    close(torch.jit.load(file)(TOKENS), expected)
    exported = torch.export.export(Logits(), (TOKENS,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    close(torch.export.load(file).module()(TOKENS), expected)
    close(logits(model, kind), expected, 0)


@each
def test_copies_are_independent(kind: str) -> None:
    model = adapted(kind)
    expected = logits(model, kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        close(logits(twin, kind), expected, 0)
        with torch.no_grad():
            for layer in layers_of(twin).values():
                layer.path("default").s_b.zero_()
        close(logits(model, kind), expected, 0)
        assert not torch.allclose(logits(twin, kind), expected)


@each
def test_peft_s_status_tells_what_there_is(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter("second", config(kind))
    status = get_model_status(model)
    assert status.peft_types == {"default": "AFLORA", "second": "AFLORA"}
    assert (status.adapter_model_type, status.active_adapters) == ("AFLoRAModel", ["default"])
    assert status.available_adapters == ["default", "second"]
    layers = [layer for layer in get_layer_status(model) if layer.module_type == "aflora.AFLoRALinear"]
    assert {layer.name for layer in layers} == {name.removeprefix("base_model.") for name in layers_of(model)}
    assert "aflora" in repr(model)
