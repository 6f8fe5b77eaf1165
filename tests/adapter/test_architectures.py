"""Every linear layer of a known architecture is adapted, and known for attention or feed-forward by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from aflora_dist import AFLoRAConfig, AFLoRAError
from aflora_dist.adapter import AFLoRALayer
from aflora_dist.adapter.architectures import TRIED, find_targets, kind_of, linear_layers
from aflora_dist.compat.contract import SEEN, is_older

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 60}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA4 = GROUPED | IDS | {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_hidden_layers": 2}
LLAMA4 |= {"interleave_moe_layer_step": 2}

# Options of the tiny model, and how many (attention, feed-forward) layers it has.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "bert": (TEXT, (4, 2)),
    "roberta": (TEXT, (4, 2)),
    "xlm-roberta": (TEXT, (4, 2)),
    "camembert": (TEXT, (4, 2)),
    "electra": (TEXT, (4, 2)),
    "layoutlm": (TEXT, (4, 2)),
    "deberta": (TEXT, (2, 2)),
    "deberta-v2": (TEXT, (4, 2)),
    "distilbert": ({"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 60}, (4, 2)),
    "modernbert": (TEXT | IDS | {"cls_token_id": 1, "sep_token_id": 2}, (2, 2)),
    "gpt2": (GPT, (2, 2)),
    "gpt_neox": (TEXT, (2, 2)),
    "gpt_neo": (TEXT | {"num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}, (4, 2)),
    "gpt_bigcode": (GPT, (2, 2)),
    "gptj": (GPT | {"rotary_dim": 4}, (4, 2)),
    "codegen": (GPT | {"rotary_dim": 4}, (2, 2)),
    "bloom": ({"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 60}, (2, 2)),
    "falcon": (TEXT, (2, 2)),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 60}, (2, 2)),
    "llama": (GROUPED, (4, 3)),
    "mistral": (GROUPED, (4, 3)),
    "qwen2": (GROUPED, (4, 3)),
    "qwen3": (GROUPED, (4, 3)),
    "gemma": (GROUPED, (4, 3)),
    "gemma2": (GROUPED, (4, 3)),
    "gemma3_text": (GROUPED, (4, 3)),
    "gemma4_text": (GROUPED | {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8}, (4, 3)),
    "stablelm": (GROUPED, (4, 3)),
    "phi": (GROUPED, (4, 2)),
    "phi3": (GROUPED | IDS, (2, 2)),
    "llama4_text": (LLAMA4, (8, 6)),  # a feed-forward and a shared expert
    "mixtral": (GROUPED | {"num_local_experts": 2}, (4, 0)),
    "opt": (TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32}, (4, 2)),
    "bart": (
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 60}
        | {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
        | {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        (12, 4),
    ),
    "t5": ({"d_model": 32, "d_ff": 64, "num_layers": 1, "d_kv": 8, "num_heads": 4, "vocab_size": 60}, (12, 4)),
    "mt5": ({"d_model": 32, "d_ff": 64, "num_layers": 1, "d_kv": 8, "num_heads": 4, "vocab_size": 60}, (12, 6)),
    "vit": (SMALL | {"image_size": 32, "patch_size": 16}, (4, 2)),
    "nemotron_h": (GROUPED | {"layers_block_type": ["mamba", "attention", "moe", "mlp"]}, (4, 4)),
    "rwkv": (TEXT | {"attention_hidden_size": 32}, (4, 3)),
    "gemma4": (
        {
            "text_config": GROUPED | {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8},
            "vision_config": SMALL | {"head_dim": 8},
            "audio_config": None,
        },
        (4, 3),
    ),
    "llama4": (
        {
            "text_config": LLAMA4,
            "vision_config": SMALL
            | {"intermediate_size": 128}
            | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
        },
        (8, 6),
    ),
    "blip-2": (
        {
            "text_config": TEXT | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
            "vision_config": SMALL,
            "qformer_config": SMALL | {"encoder_hidden_size": 32},
        },
        (4, 2),
    ),
}
SEVERAL = ["blip-2", "llama4", "gemma4"]  # models in one
REMOTE = {  # their code comes with their weights
    "chatglm": ("transformer.encoder.layers.0.self_attention.query_key_value", "encoder.layers.0.mlp.dense_h_to_4h"),
    "RefinedWeb": ("transformer.h.0.self_attention.dense", "transformer.h.0.mlp.dense_4h_to_h"),
    "RefinedWebModel": ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.mlp.dense_h_to_4h"),
    "btlm": ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc2"),
    "rwkv7": ("model.layers.0.attn.r_proj", "model.layers.0.ffn.key"),
}


def build(model_type: str) -> torch.nn.Module:
    try:
        config = AutoConfig.for_model(model_type, **MODELS[model_type][0])
    except ValueError as error:
        if not is_older("transformers", SEEN["transformers"]):
            raise
        pytest.skip(f"transformers {version('transformers')} has no such {model_type}: {error}")
    with torch.device("meta"):
        return AutoModel.from_config(config)


def test_all_that_peft_knows_for_lora_and_vera_is_known_and_tried_here() -> None:
    theirs = {*TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, *TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING}
    assert theirs <= TRIED
    assert {*MODELS, *REMOTE} == TRIED


@pytest.mark.parametrize("model_type", MODELS)
def test_every_block_layer_is_adapted_and_told_apart(model_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, expected = MODELS[model_type]
    model = get_peft_model(build(model_type), AFLoRAConfig(r=2, freezable="ffn" if expected[1] else "attention"))
    names = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, AFLoRALayer)]
    kinds = [kind_of(name) for name in names]
    assert (kinds.count("attention"), kinds.count("ffn")) == expected, names
    assert None not in kinds
    assert "not among those that were tried" not in capsys.readouterr().err
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".A")]
    assert len(trained) == (expected[1] or expected[0])


@pytest.mark.parametrize("model_type", MODELS)
def test_what_peft_adapts_by_default_is_among_what_is_adapted_here(model_type: str) -> None:
    """Where PEFT's names go beyond the language model, only that of it."""
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, [])
    pattern = targets if isinstance(targets, str) else rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
    within = "language_model" if model_type in SEVERAL else ""
    theirs = [
        name
        for name, module in build(model_type).named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(pattern, name) and within in name
    ]
    if targets and model_type not in ("gpt2",):  # Conv1D there
        assert theirs
    assert all(kind_of(name) for name in theirs)


@pytest.mark.parametrize("model_type", REMOTE)
def test_models_of_remote_code_are_told_apart_by_their_names(model_type: str) -> None:
    attention, ffn = REMOTE[model_type]
    assert (kind_of(attention), kind_of(ffn)) == ("attention", "ffn")


@pytest.mark.parametrize("model_type", SEVERAL)
def test_only_the_language_model_of_several_is_adapted(model_type: str) -> None:
    model = get_peft_model(build(model_type), AFLoRAConfig())
    assert all(".language_model." in n for n, m in model.named_modules() if isinstance(m, AFLoRALayer))
    model = get_peft_model(build(model_type), AFLoRAConfig(layers_to_transform=[0]))
    adapted = [n for n, m in model.named_modules() if isinstance(m, AFLoRALayer)]
    assert adapted
    assert all(".language_model." in name and ".layers.0." in name for name in adapted)


def test_a_further_adapter_finds_the_same_layers_below_what_is_around_them() -> None:
    """Also where another method's adapter is in the block, and a module that trains whole."""
    plain = linear_layers(build("llama"))
    model = get_peft_model(
        build("llama"), AFLoRAConfig(r=2, freezable="all", modules_to_save=["down_proj"], target_modules=["q_proj"])
    )
    left = [name for name in plain if "down_proj" not in name]
    assert [name.removeprefix("base_model.model.") for name in linear_layers(model)] == left
    model.add_adapter("second", AFLoRAConfig(r=3))
    adapted = [n for n, m in model.named_modules() if isinstance(m, AFLoRALayer) and "second" in m.aflora]
    assert len(adapted) == 7 - 1, "all but the one that trains whole"


def test_experts_that_are_bare_parameters_are_said_to_be() -> None:
    with pytest.raises(AFLoRAError, match=r"(?s)kinds: attention.*experts' weights .* bare parameters.*\"all\""):
        get_peft_model(build("mixtral"), AFLoRAConfig())


# Of the models that transformers brings, those that are not told by what holds their layers.
REFUSED = {
    *("bamba", "falcon_mamba", "granitemoehybrid", "jamba", "lfm3", "mamba", "mamba2", "recurrent_gemma", "zamba"),
    *("zamba2", "xlstm"),  # state spaces and convolutions, in some or all of their blocks
    "nemotron_h",  # whose first two blocks have no attention
    *("flaubert", "xlm", "xlnet", "squeezebert", "ibert", "fnet"),
}
MOST_USED = {
    "qwen3_moe",
    "qwen3_5",
    "gpt_oss",
    "glm4",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "ministral",
    "ministral3",
}
MOST_USED |= {"eurobert", "modernbert", "deepseek_v3", "mixtral", "phimoe"}
FEW = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
FEW += ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def every_architecture() -> Iterator[tuple[str, torch.nn.Module]]:
    """Those of language models and classifiers that can be built without choosing more than their depth."""
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}):
        kind = AutoModelForCausalLM
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            kind = AutoModelForSequenceClassification
        try:
            config = AutoConfig.for_model(model_type, **({"head_dim": 8} if model_type == "ministral" else {}))
            for option in FEW:
                if hasattr(config, option):
                    setattr(config, option, 2)
            if isinstance(getattr(config, "layer_types", None), list):
                config.layer_types = config.layer_types[:2]
            with torch.device("meta"):
                yield model_type, kind.from_config(config)
        except Exception:  # needs another package, or more options
            continue


def test_every_architecture_of_transformers_is_found_or_refused_by_name() -> None:
    outcomes: dict[str, set[str]] = {"found": set(), "refused": set()}
    for model_type, model in every_architecture():
        if (found := find_targets(model)) is None:
            outcomes["refused"].add(model_type)
            with pytest.raises(AFLoRAError, match=rf"does not know the architecture '{model_type}'.*Say which layers"):
                get_peft_model(model, AFLoRAConfig())
        else:
            outcomes["found"].add(model_type)
            layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
            endings = tuple(f".{ending}" for kind in found.values() for ending in kind)
            targets = [name for name in layers if f".{name}".endswith(endings)]
            kinds = {name: kind_of(name) for name in layers}
            assert targets == [name for name in layers if kinds[name]], model_type
            assert not any("head" in name.split(".")[0] or name.split(".")[-1] == "gate" for name in targets)
    older = is_older("transformers", SEEN["transformers"])  # 5.3 has granitemoe otherwise, and no qwen3_5
    assert outcomes["refused"] <= REFUSED | ({"granitemoe", "granitemoeshared"} if older else set()), "not found"
    assert outcomes["found"] >= MOST_USED - ({"qwen3_5"} if older else set())
    assert len(outcomes["found"] - TRIED) > 100


@pytest.mark.parametrize(("model_type", "layers"), [("smollm3", 3), ("glm4", 2), ("eurobert", 3), ("deepseek_v3", 3)])
def test_an_architecture_that_was_not_tried_is_adapted_and_said_to_be(
    model_type: str, layers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(model_type)
    config.num_hidden_layers = 2
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    model = get_peft_model(model, AFLoRAConfig())
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".A")]
    assert len(trained) == 2 * layers
    assert f"{model_type!r} is not among those that were tried" in capsys.readouterr().err
    assert all(".mlp." in name for name in trained)


def test_experts_of_an_architecture_that_is_found_are_said_to_be_bare_parameters() -> None:
    config = AutoConfig.for_model("qwen3_moe")
    config.num_hidden_layers, config.num_experts = 1, 2
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(AFLoRAError, match=r"kinds: attention.*bare parameters"):
        get_peft_model(model, AFLoRAConfig())
    model = get_peft_model(model, AFLoRAConfig(freezable="attention"))
    assert sum(n.endswith("aflora.default.A") for n, _ in model.named_parameters()) == 4
