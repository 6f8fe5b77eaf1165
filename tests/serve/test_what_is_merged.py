"""What `aflora merge` and `to-lora` take along of an adapter as other programs save it, and of a damaged model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from aflora_dist import AFLoRAConfig
from aflora_dist.adapter import lora_up
from tests.adapter.test_peft import randomise
from tests.hub_layouts import bert
from tests.small_lm import make_small_language_model, make_small_tokenizer
from tests.test_export import TOKENS, adapter_for, aflora, change_json, logits, refused
from tests.view.written import write_run


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_language_model(tmp_path_factory.mktemp("llama"))


def assert_computes(folder: Path, expected: torch.Tensor, kind: Any = AutoModelForCausalLM) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT's default in this case
def test_an_adapted_head_that_peft_saved_whole_beside_its_adapter_is_merged(tied: bool, tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base", tie_word_embeddings=tied)
    config = AFLoRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj", "lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = logits(model)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored, "not a case: PEFT did not store the base's"
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    assert_computes(tmp_path / "merged", expected)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert aflora("to-lora", tmp_path / "adapter", tmp_path / "lora") == 0
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_that_peft_saved_with_their_wrappers_are_merged(tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base", tie_word_embeddings=False)
    config = AFLoRAConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(key.endswith(".original_module.weight") for key in stored), "not a case: PEFT stored no wrapper"
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    assert_computes(tmp_path / "merged", logits(model))
    assert aflora("to-lora", tmp_path / "adapter", tmp_path / "lora") == 0
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "task_type"),
    [(AutoModelForSequenceClassification, "SEQ_CLS"), (AutoModelForTokenClassification, "TOKEN_CLS")],
)
@pytest.mark.parametrize("labels", [1, 3, 32, 40])
def test_a_classifier_has_as_many_classes_as_its_head(kind: Any, task_type: str, labels: int, tmp_path: Path) -> None:
    """A pooler that trains whole has as many outputs as there are hidden units: 32."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertModel(BertConfig(**size, intermediate_size=48), add_pooling_layer=task_type == "SEQ_CLS")
    base.save_pretrained(tmp_path / "base")
    whole = ["pooler", "classifier"] if task_type == "SEQ_CLS" else ["classifier"]
    model = get_peft_model(
        kind.from_pretrained(tmp_path / "base", num_labels=labels),
        AFLoRAConfig(task_type=task_type, modules_to_save=whole),
    )
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    assert assert_computes(tmp_path / "merged", logits(model), kind).config.num_labels == labels


@pytest.mark.parametrize("which", [{"bias": "all"}, {"modules_to_save": ["LayerNorm"]}])
def test_what_trained_whole_and_is_stored_under_another_name_does_not_lie_there_twice(
    which: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BERT's first checkpoints have LayerNorm.gamma and beta."""
    base = bert(tmp_path / "base")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base), AFLoRAConfig(task_type="SEQ_CLS", **which)
    )
    randomise(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name and parameter.requires_grad:
                parameter.add_(0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    said = refused(capsys, "merge", tmp_path / "adapter", tmp_path / "merged")
    assert "is trained whole, but the checkpoint of the base model holds no such tensor" in said
    anew = AutoModelForSequenceClassification.from_pretrained(base)
    anew.save_pretrained(tmp_path / "anew", save_original_format=False)
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "anew") == 0
    assert_computes(tmp_path / "merged", logits(model), AutoModelForSequenceClassification)


def test_a_layer_that_would_be_random_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pooler that a checkpoint of masked language modelling lacks, and that nobody named in modules_to_save."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**size, intermediate_size=48)).save_pretrained(tmp_path / "base")
    for whole, said in ((["classifier"], True), (["classifier", "pooler"], False)):
        model = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"),
            AFLoRAConfig(task_type="SEQ_CLS", modules_to_save=whole),
        )
        folder = tmp_path / str(said)
        model.save_pretrained(str(folder))
        assert aflora("merge", folder, tmp_path / f"{said}_merged") == 0
        told = "nor its base model holds the weights of bert.pooler.dense: they are random"
        assert (told in capsys.readouterr().out) is said


# -- what lies beside the adapter --------------------------------------------------------------------------------


def with_template(folder: Path, template: str, pad: str = "+") -> Any:
    """A tokenizer as Trainer saves it beside an adapter: with another template and pad token than the base model's."""
    tokenizer = make_small_tokenizer(template)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("command", ["merge", "to-lora"])
def test_the_tokenizer_beside_the_adapter_is_the_one_that_is_taken(command: str, tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base")
    make_small_tokenizer("the base's").save_pretrained(base)
    (base / "vocab.txt").write_text("of another tokenizer")
    adapter, expected = adapter_for(base, tmp_path / "adapter")
    saved = with_template(adapter, "the training's {{ messages }}")
    assert aflora(command, adapter, tmp_path / "out") == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.chat_template, found.pad_token) == (saved.chat_template, "+")
    if command == "merge":
        model = assert_computes(tmp_path / "out", expected)
        assert model.config.pad_token_id == model.generation_config.pad_token_id == saved.pad_token_id
        assert not (tmp_path / "out" / "vocab.txt").exists(), "two tokenizers are mixed"


def test_records_of_the_base_model_s_training_are_not_those_of_what_is_merged(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    adapter, _ = adapter_for(base, tmp_path / "adapter")
    records = ["result.json", "trainer_state.json", "all_results.json", "eval_results.json", "training.json"]
    for name in [*records, "preprocessor_config.json"]:
        (base / name).write_text("{}")
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "preprocessor_config.json" in found
    assert not found & {*records}


def test_a_template_alone_replaces_the_base_model_s(tmp_path: Path) -> None:
    base = make_small_language_model(tmp_path / "base")
    make_small_tokenizer("the base's").save_pretrained(base)
    adapter, _ = adapter_for(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("the training's")
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (found.chat_template, found.pad_token) == ("the training's", "<pad>")


@pytest.mark.parametrize("run", [False, True], ids=["beside the adapter", "a run's"])
def test_a_classifier_finds_the_last_token_by_the_pad_token_of_its_training(run: bool, tmp_path: Path) -> None:
    """Of a run that is the base model's tokenizer's, whatever the base model's configuration says."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, eos_token_id=3, bos_token_id=2)
    config.pad_token_id = 9 if run else None
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")  # has no pad token, and no tokenizer
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.config.pad_token_id = with_template(tmp_path / ("base" if run else "adapter"), "").pad_token_id
    model = get_peft_model(base, AFLoRAConfig(task_type="SEQ_CLS", modules_to_save=["score"]))
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))
    if run:
        (tmp_path / "config.yaml").write_text("{model: {name: base}, data: {task: files}, train: {}}")
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    padded = torch.cat([TOKENS, torch.full((2, 3), base.config.pad_token_id)], dim=1)
    with torch.no_grad():
        expected, found = (m.eval()(padded).logits for m in (model, merged))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_said(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    tokenizer = make_small_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(adapter)
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    assert "1 tokens more than the model's embedding" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # a pad token outside could not be loaded


# -- the base model, and the run ------------------------------------------------------------------------------------


def test_a_base_by_a_relative_path_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, _ = adapter_for(make_small_language_model(Path("base")), tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    make_small_language_model(tmp_path / "elsewhere" / "base", rms_norm_eps=1e-3)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    assert f"by a relative path, base, and {tmp_path / 'elsewhere' / 'base'} was taken" in capsys.readouterr().out
    assert "by a relative path" in (tmp_path / "merged" / "README.md").read_text()
    assert aflora("merge", adapter, tmp_path / "again", "--base", "../base") == 0
    assert "relative path" not in capsys.readouterr().out


@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_base_is_called_that(
    sharded: bool, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(base, max_shard_size="20KB" if sharded else "1GB")
    *_, last = sorted(base.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 8)
    said = refused(capsys, "merge", adapter, tmp_path / "out", "--base", base)
    assert f"{last} cannot be read" in said
    assert "The model's file is damaged" in said
    assert "could not be written" not in said
    last.unlink()
    assert "missing" in refused(capsys, "merge", adapter, tmp_path / "out", "--base", base) or not sharded
    assert not list(tmp_path.glob("*out*"))


def test_modelling_code_runs_where_the_command_line_says_so_alone(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    plain = AutoModelForCausalLM.from_pretrained(llama)
    # Not tied: transformers 5.3 leaves out tied weights of modelling code of a model's own.
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.config.tie_word_embeddings = False
    plain.save_pretrained(base)
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Configuration(LlamaConfig):\n    model_type = 'own_model'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Configuration\n"
    )
    classes = {"AutoConfig": "own.Configuration", "AutoModelForCausalLM": "own.Model"}
    change_json(base / "config.json", lambda c: c.update(model_type="own_model", auto_map=classes))
    adapter, expected = adapter_for(llama, tmp_path / "adapter")
    said = refused(capsys, "merge", adapter, tmp_path / "merged", "--base", base)
    assert "only this command line can have it run" in said
    assert aflora("merge", adapter, tmp_path / "merged", "--base", base, "--trust_remote_code") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_run_of_an_earlier_release_has_a_card(llama: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    adapter_for(llama, run / "adapter")
    for left in ({"world_size", "engine", "avg_trainable_params"}, {"steps", "evaluations", "task"}, {"metrics"}):
        change_json(run / "result.json", lambda c, left=left: [c.pop(key, None) for key in left])
        assert aflora("to-lora", run, tmp_path / f"lora_{len(left)}_{min(left)}") == 0
        card = (tmp_path / f"lora_{len(left)}_{min(left)}" / "README.md").read_text()
        assert "seed: 0" in card
        assert str(run) not in card.partition("Exported with")[0], "a path of this machine"


@pytest.mark.parametrize("base", ["owner/name", "/cache/hub/models--owner--name/snapshots/0a1b", "/a/folder"])
def test_the_card_of_a_lora_names_its_base_as_peft_s_own_cards_do(base: str, llama: Path, tmp_path: Path) -> None:
    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path=base))
    assert aflora("to-lora", adapter, tmp_path / "lora") == 0
    name = ModelCard.load(tmp_path / "lora" / "README.md").data.base_model
    assert name == ("/a/folder" if base == "/a/folder" else "owner/name")


def test_a_merged_weight_is_that_of_the_adapter_s_own_formula(llama: Path, tmp_path: Path) -> None:
    """In double, from the stored head and not from the base model's."""
    base = make_small_language_model(tmp_path / "base", tie_word_embeddings=False)
    adapter, _ = adapter_for(base, tmp_path / "adapter", target_modules=["lm_head"], freezable="all")
    assert aflora("merge", adapter, tmp_path / "merged") == 0
    stored = load_file(adapter / "adapter_model.safetensors")
    A, B, s_d, s_b = (stored[f"base_model.model.lm_head.aflora.{key}"].double() for key in ("A", "B", "s_d", "s_b"))
    expected = load_file(base / "model.safetensors")["lm_head.weight"].double() + lora_up(B, s_d, s_b) @ A
    found = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == A.shape[0]


@pytest.mark.parametrize("whole_names", [True, False])
def test_a_pickle_that_stores_tied_weights_is_merged(whole_names: bool, tmp_path: Path) -> None:
    """A checkpoint of pretraining, whose decoder is the embedding: safetensors holds no memory twice, pickles do."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    pretrained = BertForMaskedLM(BertConfig(vocab_size=50, **sizes))
    pretrained.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(pretrained.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    assert len({t.data_ptr() for t in pretrained.state_dict().values()}) < len(pretrained.state_dict())
    kind, task = (AutoModelForMaskedLM, None) if whole_names else (AutoModelForSequenceClassification, "SEQ_CLS")
    config = AFLoRAConfig(task_type=task, modules_to_save=["pooler"] if task else None)
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    randomise(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "base") == 0
    merged = kind.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_what_may_have_several_labels_still_may(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=3, problem_type="multi_label_classification", **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, AFLoRAConfig(task_type="SEQ_CLS")).save_pretrained(str(tmp_path / "adapter"))
    assert aflora("merge", tmp_path / "adapter", tmp_path / "merged") == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["problem_type"] == config.problem_type
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=2, ignore_mismatched_sizes=True, problem_type="single_label_classification"
    )
    get_peft_model(base, AFLoRAConfig(task_type="SEQ_CLS")).save_pretrained(str(tmp_path / "of_two"))
    assert aflora("merge", tmp_path / "of_two", tmp_path / "merged_of_two") == 0
    kind = json.loads((tmp_path / "merged_of_two" / "config.json").read_text())["problem_type"]
    assert kind == "single_label_classification"


@pytest.mark.parametrize("where", ["a link", "here", "a link to nothing"])
def test_a_folder_that_cannot_be_replaced_is_filled(
    where: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = adapter_for(llama, tmp_path / "adapter")
    (real := tmp_path / "real").mkdir()
    (out := tmp_path / "out").symlink_to(real)
    if where == "a link to nothing":
        real.rmdir()
    if where == "here":
        monkeypatch.chdir(real)
        out = Path()
    assert aflora("to-lora", adapter, out) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == {path.name for path in real.iterdir()}


@pytest.mark.parametrize("name", ["mine", "checkpoint-8"])
def test_a_folder_of_adapters_says_which_there_are(
    name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As PEFT writes one that is not called default, and Trainer its checkpoints."""
    adapter_for(llama, tmp_path / "folder" / name)
    said = refused(capsys, "merge", tmp_path / "folder", tmp_path / "out")
    assert f"holds some: {name}. Name the folder of one, as {tmp_path / 'folder' / name}." in said
    assert aflora("to-lora", tmp_path / "folder" / name, tmp_path / "out") == 0


def test_an_adapter_that_is_called_adapter_is_not_taken_for_the_one_beside_it(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), AFLoRAConfig(task_type="CAUSAL_LM", r=4))
    model.add_adapter("adapter", AFLoRAConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(str(tmp_path / "both"))
    for folder, r in ((tmp_path / "both", 4), (tmp_path / "both" / "adapter", 2)):
        assert aflora("to-lora", folder, tmp_path / f"lora{r}") == 0
        assert json.loads((tmp_path / f"lora{r}" / "adapter_config.json").read_text())["r"] == r
