"""What the main job saves of a method of PEFT is what trained, also where it froze before the end."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from aflora_dist.methods.choose import create_method
from aflora_dist.methods.peft import Peft
from aflora_dist.options import Config, DataConfig, MethodConfig, ModelConfig
from aflora_dist.tasks.model import load_base
from aflora_dist.training.run import main as train
from tests.runs import options
from tests.small_lm import make_small_language_model, make_small_tokenizer, write_problems

_BART = ("layers", "attention_heads", "ffn_dim")
FREEZES = {"freezing.enabled": True, "train.learning_rate": 0.05, "train.head_learning_rate": 0.05}


@pytest.mark.parametrize(
    ("method", "said", "more"),
    [
        ("lora", {"r": 2, "bias": "all"}, {"freezing.prefix": True, "freezing.score": "front_to_back"}),
        ("lora", {"r": 2, "bias": "all"}, {"freezing.freezable": ".*bias"}),
        ("oft", {"bias": "all", "oft_block_size": 8}, {"freezing.prefix": True}),
    ],
    ids=["lora, prefix", "lora, biases freeze", "oft, prefix"],
)
def test_biases_that_froze_are_saved(
    method: str,
    said: dict[str, Any],
    more: dict[str, Any],
    tiny_model: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapter's folder, loaded by PEFT alone, is the model that `result.json` was measured on."""
    if method == "oft" and Version(version("peft")) < Version("0.21"):
        pytest.skip("PEFT before 0.21 saves no biases of OFT")
    live: dict[str, torch.Tensor] = {}
    original = Peft.save

    def save(self: Any, model: Any, *args: Any) -> None:
        live.update({name: p.detach().clone() for name, p in model.named_parameters()})
        original(self, model, *args)

    monkeypatch.setattr(Peft, "save", save)
    run = tmp_path / "run"
    line = options(run, tiny_model, reviews, **FREEZES, **more)
    assert train([*line, "--method.name", method, "--method.options", json.dumps(said)]) == 0
    loaded = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tiny_model), run / "adapter")
    base = dict(AutoModelForSequenceClassification.from_pretrained(tiny_model).named_parameters())
    found = dict(loaded.named_parameters())
    assert found.keys() == live.keys()
    moved = [n for n in live if "bias" in n and n.removeprefix("base_model.model.") in base]
    assert any(not torch.equal(live[n], base[n.removeprefix("base_model.model.")]) for n in moved)
    for name, value in live.items():
        if "original_module" in name:  # which is random, and not used
            continue
        torch.testing.assert_close(found[name].data, value, rtol=0, atol=0, msg=name)


def test_tokens_that_train_by_index_freeze_and_are_saved(tmp_path: Path) -> None:
    model = make_small_language_model(tmp_path / "model")
    for name, count in (("train", 32), ("dev", 8)):
        write_problems(tmp_path / f"{name}.jsonl", count, seed=count)
    more = {
        "data.task": "sft",
        "data.train_file": tmp_path / "train.jsonl",
        "data.validation_file": tmp_path / "dev.jsonl",
        "data.max_new_tokens": 2,
        "train.epochs": 2,
        "train.batch_size": 8,
        "freezing.final_epochs": 0,
    }
    line = options(tmp_path / "run", model, tmp_path, **FREEZES | more)
    said = json.dumps({"r": 2, "trainable_token_indices": [4, 5]})
    assert train([*line, "--method.name", "lora", "--method.options", said]) == 0
    assert "trainable_tokens_delta" in " ".join(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"r": 2, "alora_invocation_tokens": [7]}, "would train nothing of a classifier's adapter"),
        ({"r": 2, "init_lora_weights": "eva"}, "it would begin as plain LoRA"),
    ],
)
def test_what_would_be_something_else_in_silence_is_refused(
    said: dict[str, Any],
    expected: str,
    tiny_model: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = options(tmp_path / "run", tiny_model, reviews, **{"method.name": "lora"})
    line = [w for i, w in enumerate(line) if not w.startswith("--freezing") and not line[i - 1].startswith("--freez")]
    assert train([*line, "--method.options", json.dumps(said)]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", ["aflora", "lora"])
@pytest.mark.parametrize("family", ["roberta", "bart"])
def test_a_head_of_a_checkpoint_trains_whole_and_is_loaded_for_other_classes_too(
    family: str, method: Any, classes: int, tmp_path: Path
) -> None:
    """Of two layers one is new with other classes; BART's head has no name that PEFT knows."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "bart":
        sides = {f"{side}_{kind}": 16 if kind == "ffn_dim" else 1 for side in ("encoder", "decoder") for kind in _BART}
        sizes = {"d_model": 16, **sides}
    config = AutoConfig.for_model(family, **sizes, vocab_size=40, max_position_embeddings=32, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    make_small_tokenizer().save_pretrained(tmp_path / "base")
    said = ModelConfig(name=str(tmp_path / "base"))
    names = [str(number) for number in range(classes)]
    base, _, head = load_base(said, names)
    trained = create_method(Config(model=said, data=DataConfig(task="files"), method=MethodConfig(name=method)))
    model = trained.adapt(base, head).eval()
    parts = {name.partition(".modules_to_save.")[0] for name, _ in model.named_parameters() if trained.is_head(name)}
    assert parts == {f"base_model.model.{'classifier' if family == 'roberta' else 'classification_head'}"}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    values = {name: p.detach() for name, p in model.named_parameters() if trained.saved(name, p.requires_grad)}
    trained.save(model, tmp_path / "adapter", values)
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=classes, ignore_mismatched_sizes=True
    )
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]])}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, model(**ids).logits)
