"""What the loss takes for granted of a model is tried before time is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification

from aflora_dist import AFLoRAError
from aflora_dist.tasks.classification import Classification
from aflora_dist.tasks.sft import LanguageModelling
from aflora_dist.tasks.sft.rehearsal import check_kind, check_no_future
from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main as run_main
from tests.runs import command, command_line, options
from tests.small_lm import PIECES, make_small_tokenizer, write_problems

plan_main = command("plan")
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def language_model(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **SMALL, vocab_size=len(PIECES), pad_token_id=0, bos_token_id=2, eos_token_id=3, **more
    )
    return AutoModelForCausalLM.from_config(config)


def arguments(folder: Path, model: Any) -> list[str]:
    model.save_pretrained(folder / "model")
    make_small_tokenizer().save_pretrained(folder / "model")
    write_problems(folder / "data.jsonl", 8, seed=0)
    return command_line(
        {
            "run.dir": folder / "run",
            "run.trackers": "[]",
            "model.name": folder / "model",
            "data.task": "sft",
            "data.train_file": folder / "data.jsonl",
            "data.validation_file": folder / "data.jsonl",
            "data.max_length": 64,
            "data.max_eval_examples": 1,
            "data.max_new_tokens": 1,
            "method.name": "lora",
            "train.epochs": 1,
            "train.batch_size": 4,
        }
    )


MIXTRAL = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": 1.0}


def test_a_loss_with_a_term_for_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path, language_model("mixtral", output_router_logits=True, **MIXTRAL))
    assert run_main(given) == 2
    assert "MixtralForCausalLM computes a loss of " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_same_model_without_that_term_passes(tmp_path: Path) -> None:
    config, _ = parse(arguments(tmp_path, language_model("mixtral", **MIXTRAL)))
    task, accelerator = LanguageModelling(config), Accelerator(cpu=True)
    model, _ = task.load(accelerator)
    task.batches(accelerator)
    task.rehearse(model, accelerator)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlm-roberta"])
def test_an_encoder_is_no_language_model(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path, language_model(family))
    for start in (run_main, lambda words: plan_main([*words, "--ranks", "1"])):
        assert start(given) == 2
        assert "sees the tokens that come after those that it is to continue" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    decoder = language_model(family, is_decoder=True).eval()
    check_kind(decoder)
    check_no_future(decoder, decoder, torch.arange(4, 12).unsqueeze(0), 1e-5)


@pytest.mark.parametrize("family", ["bert", "rembert", "megatron-bert"])
def test_what_sees_the_future_is_found_by_shuffling_it(family: str) -> None:
    encoder = language_model(family).eval()
    with pytest.raises(AFLoRAError, match="is no causal language model"):
        check_no_future(encoder, encoder, torch.arange(4, 12).unsqueeze(0), 1e-5)


@pytest.mark.parametrize("labels", ["classes", "numbers"])
def test_a_classifier_s_loss_has_to_be_the_mean_of_its_examples(
    labels: str, tiny_model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = reviews / "train.csv"
    if labels == "numbers":
        path = tmp_path / "train.csv"
        path.write_text("text,label\n" + "".join(f"good film {i},{i / 7}\n" for i in range(20)))
    files = {"data.train_file": path, "data.validation_file": path}
    config, _ = parse(options(tmp_path / "run", tiny_model, reviews, **files))
    task, accelerator = Classification(config), Accelerator(cpu=True)
    model, _ = task.load(accelerator)
    task.batches(accelerator)
    task.rehearse(model, accelerator)
    own = BertForSequenceClassification.forward

    def regularised(*given: Any, **named: Any) -> Any:
        found = own(*given, **named)
        found.loss = found.loss + 0.5
        return found

    monkeypatch.setattr(BertForSequenceClassification, "forward", regularised)
    with pytest.raises(AFLoRAError, match="BertForSequenceClassification computes a loss of"):
        task.rehearse(model, accelerator)
