"""The tuner behaves as a PEFT user expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
)

from aflora_dist import AFLoRAConfig, AFLoRAError, save_as_lora
from aflora_dist.adapter import AFLoRALayer
from aflora_dist.errors import ExistsError

TOKENS = torch.arange(1, 13).view(2, 6)


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    return BertForSequenceClassification(BertConfig(vocab_size=50, **size)).eval()


def adapted(model: Any = None, seed: int = 1, **config: Any) -> PeftModel:
    model = get_peft_model(model or bert(), AFLoRAConfig(**{"task_type": "SEQ_CLS", **config}))
    randomise(model, seed)
    return model.eval()


def randomise(model: Any, seed: int, adapter: str = "default") -> None:
    """As if trained: s_b = 0 would make every adapter the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".aflora.{adapter}.s_" in name or ("modules_to_save" in name and adapter in name):
            parameter.data.normal_(0, 0.3, generator=generator)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def test_an_untrained_adapter_leaves_the_model_as_it_was() -> None:
    model = bert()
    before = logits(model)
    peft_model = get_peft_model(model, AFLoRAConfig(task_type="SEQ_CLS")).eval()
    torch.testing.assert_close(logits(peft_model), before, rtol=0, atol=0)


def test_saving_and_loading_gives_the_same_model(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "family", "sizes"),
    [
        (AutoModelForSequenceClassification, "deberta-v2", _SMALL),
        (AutoModelForSequenceClassification, "distilbert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
        (AutoModelForSequenceClassification, "modernbert", {**_SMALL, "pad_token_id": 0}),
        (AutoModelForTokenClassification, "modernbert", {**_SMALL, "pad_token_id": 0}),
        (AutoModelForQuestionAnswering, "bert", _SMALL),
    ],
)
@pytest.mark.parametrize("targets", [{}, {"target_modules": "all-linear", "freezable": "all"}])
def test_no_part_of_a_head_is_drawn_anew_where_the_adapter_is_loaded(
    kind: Any, family: str, sizes: dict[str, Any], targets: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint is a body's, as on the hub: each from_pretrained draws all of the head."""
    AutoModel.from_config(AutoConfig.for_model(family, vocab_size=50, **sizes)).save_pretrained(tmp_path / "base")

    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        return kind.from_pretrained(tmp_path / "base")

    task_type = {
        AutoModelForSequenceClassification: "SEQ_CLS",
        AutoModelForTokenClassification: "TOKEN_CLS",
        AutoModelForQuestionAnswering: "QUESTION_ANS",
    }[kind]
    targets = targets or {"target_modules": ["query", "q_lin", "query_proj", "Wqkv"], "freezable": "all"}
    model = adapted(drawn(1), task_type=task_type, **targets)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(drawn(2), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    body = model.get_base_model().base_model_prefix
    outside = {n for n, p in drawn(1).named_parameters() if not n.startswith(f"{body}.")}
    trained = {n.replace(".modules_to_save.default", "") for n, p in model.named_parameters() if p.requires_grad}
    assert outside <= {name.removeprefix("base_model.model.") for name in trained}


def test_merging_gives_a_plain_model_of_the_same_function() -> None:
    model = adapted()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, AFLoRALayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_merge_unmerge_and_disable_come_back_to_where_they_began() -> None:
    base, model = logits(bert()), adapted(modules_to_save=[], task_type=None)
    expected = logits(model)
    assert not torch.allclose(expected, base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_safe_merge_refuses_a_broken_adapter() -> None:
    model = adapted()
    next(p for n, p in model.named_parameters() if n.endswith("s_b")).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="broken"):
        model.merge_and_unload(safe_merge=True)


def test_several_adapters_switch_and_delete() -> None:
    model = adapted()
    first = logits(model)
    model.add_adapter("other", AFLoRAConfig(r=2, freezable="attention", task_type="SEQ_CLS"))
    randomise(model, 5, "other")
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    names = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".A")}
    assert names
    assert all("attention" in n and ".other." in n for n in names)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)


def test_frozen_matrices_stay_frozen_whatever_peft_switches() -> None:
    model = adapted()
    path = next(m for m in model.modules() if isinstance(m, AFLoRALayer)).aflora["default"]
    assert path.frozen == {"A", "B"}  # attention
    model.set_adapter("default")
    model.base_model.set_requires_grad("default", True)
    with model.disable_adapter():
        pass
    assert [n for n, p in path.named_parameters() if p.requires_grad] == ["s_d", "s_b"]


def test_layers_to_transform_and_modules_to_save() -> None:
    model = adapted(layers_to_transform=[1], modules_to_save=["pooler"])
    layers = [n for n, m in model.named_modules() if isinstance(m, AFLoRALayer)]
    assert len(layers) == 6
    assert all(".layer.1." in n for n in layers)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in n for n in trainable)


def test_the_plain_lora_adapter_computes_the_same(tmp_path: Path) -> None:
    model = adapted()
    save_as_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "lora").eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(ExistsError, match="already holds an adapter; choose another folder"):
        save_as_lora(model, tmp_path / "lora")


def test_gpt2_conv1d_layers_merge_and_convert(tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)).eval()

    model = adapted(gpt2(), task_type="CAUSAL_LM")
    expected = logits(model)
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_base_keeps_its_dtype() -> None:
    model = adapted(bert().to(torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if ".aflora." in n or ".modules_to_save." in n} == {
        torch.float32
    }
    assert {p.dtype for n, p in model.named_parameters() if ".base_layer." in n or "embeddings" in n} == {
        torch.bfloat16
    }
    assert logits(model).dtype == torch.float32  # the head's, which trains
    body = model(TOKENS, output_hidden_states=True).hidden_states
    assert {hidden.dtype for hidden in body} == {torch.bfloat16}


# -- counts: facts that a correct implementation reproduces -----------------------------------------------


@pytest.fixture(scope="module")
def deberta_v3_base() -> Any:
    """The architecture of DeBERTaV3-base without memory for its weights, adapted with the defaults."""
    size: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
    }
    with torch.device("meta"):
        return get_peft_model(DebertaV2Model(DebertaV2Config(vocab_size=128100, **size)), AFLoRAConfig())


def test_trainable_parameters_of_deberta_v3_base(deberta_v3_base: Any) -> None:
    trainable = {n: p.numel() for n, p in deberta_v3_base.named_parameters() if p.requires_grad}
    assert sum(v for n, v in trainable.items() if n.endswith((".s_d", ".s_b"))) == 83_232
    assert sum(v for n, v in trainable.items() if n.endswith((".A", ".B"))) == 368_640
    assert sum(trainable.values()) == 451_872
    assert len([n for n in trainable if n.endswith((".A", ".B"))]) == 48


def test_lora_r8_of_the_same_layers(deberta_v3_base: Any) -> None:
    from aflora_dist.methods.choose import lora_parameters

    assert lora_parameters(deberta_v3_base) == 1_327_104


# -- which layers train, and what is refused -------------------------------------------------------------


def test_a_pattern_chooses_the_freezable_layers() -> None:
    model = adapted(freezable=r".*layer\.1\.output\.dense")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith((".A", ".B"))}
    assert {n.split(".layer.")[1].split(".aflora")[0] for n in trained} == {"1.output.dense"}


@pytest.mark.parametrize(
    ("freezable", "freezing", "matrices"),
    [
        ("ffn", "never", 8),
        ("attention", "adaptive", 16),
        ("all", "adaptive", 24),
        ("none", "adaptive", 0),
        ("all", "always", 0),
    ],
)
def test_the_paper_s_ablations(freezable: str, freezing: str, matrices: int) -> None:
    model = adapted(freezable=freezable, freezing=freezing)
    assert sum(p.requires_grad for n, p in model.named_parameters() if n.endswith((".A", ".B"))) == matrices


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"r": True}, "r must be a whole number"),
        ({"aflora_dropout": 1.0}, "aflora_dropout must be less than 1"),
        ({"aflora_dropout": None}, "aflora_dropout must be a number"),
        ({"d_initial": 0}, "nothing would ever train"),
        ({"d_initial": float("nan")}, "d_initial must be a finite number"),
        ({"d_initial": "0.1"}, "d_initial must be a number"),
        ({"freezing": "sometimes"}, "freezing must be"),
        ({"freezable": "(("}, "does not compile"),
        ({"bias": "some"}, "bias must be"),
        ({"layers_pattern": "layer"}, "layers_to_transform"),
    ],
)
def test_a_wrong_configuration_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(AFLoRAError, match=said):
        AFLoRAConfig(**config)


def test_nothing_freezable_is_refused_and_says_what_there_is() -> None:
    with pytest.raises(AFLoRAError, match=r"matches none of the 2 adapted layers.*attention"):
        adapted(target_modules=["key"])


class Unknown(torch.nn.Module):
    """Of no known architecture: three linear layers, one of them a head, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        self.norm, self.lm_head = torch.nn.LayerNorm(4), torch.nn.Linear(4, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.down(self.up(x).relu())))


def test_an_unknown_architecture_gets_one_error_that_says_all_and_proposes_no_head() -> None:
    model = Unknown()
    with pytest.raises(AFLoRAError, match=r"(?s)target_modules=.*freezable=.*end in: down, up;.*regular expression"):
        get_peft_model(model, AFLoRAConfig())
    with pytest.raises(AFLoRAError, match='"all", "none" or a regular expression'):
        get_peft_model(model, AFLoRAConfig(target_modules=["up"]))
    assert get_peft_model(model, AFLoRAConfig(target_modules=["up"], freezable="all"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing freezable": ({"target_modules": ["up"]}, "does not know which layers"),
    "a pattern of nothing": ({"target_modules": ["up"], "freezable": "nowhere"}, "nothing to train and freeze"),
    "no linear layer": ({"target_modules": ["up", "norm"], "freezable": "all"}, r"'norm' is LayerNorm"),
    "no such layer": ({"target_modules": ["nowhere"], "freezable": "all"}, "No modules were targeted|not found"),
    "unknown": ({}, "architecture"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(why: str) -> None:
    def state(model: torch.nn.Module) -> list[Any]:
        hooks = [bool(m._forward_hooks or m._forward_pre_hooks) for m in model.modules()]
        return [[*model.state_dict()], [p.requires_grad for p in model.parameters()], hooks, [*model.__dict__]]

    options, said = REFUSED[why]
    model = Unknown()
    for adapt in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        before = state(model)
        with pytest.raises(ValueError, match=said):
            adapt(model, AFLoRAConfig(**options))
        assert state(model) == before
    fine = AFLoRAConfig(target_modules=["up", "down"], freezable="all")
    adapted_model = get_peft_model(model, fine)
    before = state(adapted_model)
    with pytest.raises(ValueError, match=said):
        adapted_model.add_adapter("second", AFLoRAConfig(**options))
    assert state(adapted_model) == before
    assert [*adapted_model.peft_config] == ["default"]
    adapted_model.add_adapter("second", fine)
    with pytest.raises(ValueError, match=said):
        inject_adapter_in_model(AFLoRAConfig(**options), adapted_model.get_base_model(), "third")
    assert [*adapted_model.peft_config] == ["default", "second"]


def test_a_layer_that_holds_lora_is_said_to() -> None:
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"])).get_base_model()
    with pytest.raises(AFLoRAError, match=r"self\.query' holds an adapter of another method already .*lora.*unload"):
        get_peft_model(model, AFLoRAConfig())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"rank_pattern": {"query": 8}}, "one rank r"),
        ({"alpha_pattern": {"query": 8}}, "do the scaling"),
        ({"lora_alpha": 16}, "do the scaling"),
        ({"lora_dropout": 0.1}, "aflora_dropout"),
        ({"ensure_weight_tying": True}, "untie"),
        ({"target_parameters": ["experts.down_proj"]}, "not bare parameters"),
        ({"trainable_token_indices": [0]}, "modules_to_save"),
    ],
)
def test_options_of_other_methods_are_refused_with_a_clear_word(option: dict[str, Any], said: str) -> None:
    with pytest.raises(AFLoRAError, match=f"AFLoRAConfig has no {next(iter(option))}.*{said}"):
        AFLoRAConfig(**option)


def test_no_matching_module_is_peft_s_error() -> None:
    with pytest.raises(ValueError, match="No modules were targeted"):
        adapted(target_modules=["nowhere"])


def test_a_model_that_transformers_has_adapted_is_saved_as_lora_by_peft_s_names(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(AFLoRAConfig(modules_to_save=["classifier"]), adapter_name="default")
    randomise(model, 1)
    save_as_lora(model, tmp_path / "lora")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(lora(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beside", [True, False])
def test_somebody_s_readme_stops_no_saving(beside: bool, tmp_path: Path) -> None:
    (folder := tmp_path / "project" / "adapter").mkdir(parents=True)
    ((folder if beside else folder.parent) / "README.md").write_bytes("Caf\u00e9".encode("latin-1"))
    model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2))
    model.add_adapter(AFLoRAConfig(), adapter_name="default")
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
