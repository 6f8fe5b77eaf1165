"""What a model cannot take is refused before training, by the plan as by the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from aflora_dist import AFLoRAError
from aflora_dist.tasks.limits import Limits
from aflora_dist.training.run import main as run_main
from tests.launch import MAIN_JOB, launch
from tests.runs import command, command_line, options
from tests.small_lm import PIECES, make_small_language_model, make_small_tokenizer, write_problems
from tests.tasks.chats import chat_tokenizer

plan_main = command("plan")
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
NO_LIMIT = {"xlnet": {"n_layer": 1, "d_model": 16, "n_head": 2, "d_inner": 16}}
FAMILIES = [
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "data2vec-text",
    "roberta-prelayernorm",
    "ibert",
    "bert",
    "electra",
    "albert",
    "gpt2",
    "opt",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_tokens_as_are_said_pass_and_one_more_does_not(family: str, padding: int) -> None:
    own = {"word_embed_proj_dim": 16, "ffn_dim": 16} if family == "opt" else {}
    config = AutoConfig.for_model(
        family, **SMALL, **own, max_position_embeddings=24, vocab_size=40, pad_token_id=padding, eos_token_id=2
    )
    kind = AutoModelForCausalLM if family in ("gpt2", "opt") else AutoModelForSequenceClassification
    model = kind.from_config(config).eval()
    limit = Limits.of(model, family).positions
    assert limit is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_a_model_without_positions_takes_any_number() -> None:
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("xlnet", **NO_LIMIT["xlnet"]))
    assert Limits.of(model, "xlnet").positions is None


def both(arguments: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the run and its plan refuse, in the same words, before anything is made."""
    assert run_main(arguments) == 2
    said = capsys.readouterr().err
    assert not run.exists()
    assert plan_main([*arguments, "--ranks", "1", "2"]) == 2
    errors = [[line for line in err.splitlines() if "error:" in line] for err in (said, capsys.readouterr().err)]
    assert errors[0] == errors[1]
    return said


def language(run: Path, model: Path, train: Path, held: Path, **more: Any) -> list[str]:
    chosen = {
        "run.dir": run,
        "run.trackers": "[]",
        "model.name": model,
        "data.task": "sft",
        "data.train_file": train,
        "data.validation_file": held,
        "data.max_length": 60,
        "data.max_new_tokens": 8,
        "train.epochs": 1,
        "train.batch_size": 4,
        **more,
    }
    return command_line(chosen)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    write_problems(tmp_path / "train.jsonl", 8, seed=0)
    return tmp_path / "train.jsonl"


@pytest.mark.parametrize("length", [513, 514])
def test_roberta_has_fewer_positions_than_its_configuration_says(
    length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model("roberta", **SMALL, max_position_embeddings=514, vocab_size=500, pad_token_id=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    chat_tokenizer("RoBERTa").save_pretrained(tmp_path / "model")
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"yes {i},{i % 2}\n" for i in range(16)))
    more = {"data.validation_file": tmp_path / "train.csv", "data.max_length": length}
    arguments = options(tmp_path / "run", tmp_path / "model", tmp_path, **more)
    assert f"data.max_length={length} is more than the 512 positions of" in both(arguments, tmp_path / "run", capsys)
    assert plan_main([*arguments, "--data.max_length", "512", "--ranks", "1"]) == 0


@pytest.mark.parametrize(("pair", "least"), [(False, 3), (True, 5)])
def test_texts_are_not_cut_to_nothing_and_that_they_are_cut_is_said(
    pair: bool, least: int, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """[CLS] and [SEP] are not a text; nor is a pair's one half."""
    rows = "".join(f"good{' film' * (i % 4)},plot,{i % 2}\n" for i in range(16))
    (tmp_path / "train.csv").write_text("text,other,label\n" + rows)
    columns = "[text, other]" if pair else "[text]"
    more = {"data.validation_file": tmp_path / "train.csv", "train.epochs": 2, "data.text_columns": columns}
    arguments = options(tmp_path / "run", tiny_model, tmp_path, **more)
    short = [*arguments, "--data.max_length", str(least - 1)]
    assert f"data.max_length={least - 1} leaves nothing of the texts" in both(short, tmp_path / "run", capsys)
    assert plan_main([*arguments, "--data.max_length", str(least + 1), "--ranks", "1"]) == 0
    said = f"Of 16 examples of the training split: 12 have {least + 1} tokens or more, and are cut there"
    assert said in "".join(capsys.readouterr())
    assert plan_main([*arguments, "--data.max_length", str(least + 4), "--ranks", "1"]) == 0
    assert "are cut there" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("long", ["prompt", "answer"])
def test_prompts_have_to_leave_room_for_their_answers(
    long: str, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small_tokenizer().save_pretrained(tmp_path / "model")
    config = GPT2Config(
        vocab_size=len(PIECES), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "Ada", "answer": 4}, {"prompt": "how " * (30 if long == "prompt" else 20), "answer": 3}]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(map(json.dumps, rows)))
    room = 8 if long == "prompt" else 30
    arguments = language(tmp_path / "run", tmp_path / "model", train, held, **{"data.max_new_tokens": room})
    said = both(arguments, tmp_path / "run", capsys)
    assert "Example 2 of the evaluation data asks with" in said
    assert f"data.max_new_tokens={room} that is more than the 64 positions" in said
    if long == "answer":
        assert plan_main([*arguments, "--data.max_new_tokens", "5", "--ranks", "1"]) == 0


@pytest.mark.parametrize("token", ["<tool>", "[PAD]"])
def test_tokens_beyond_the_embedding_are_refused(
    token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_small_language_model(tmp_path / "model")
    tokenizer = make_small_tokenizer()
    if token == "[PAD]":
        tokenizer.add_special_tokens({"pad_token": token})
    else:
        tokenizer.add_tokens([token])
    tokenizer.save_pretrained(model)
    rows = [{"prompt": "Ada has", "completion": "3"}] * 5 + [{"prompt": "how <tool>", "completion": "3"}] * 3
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    said = both(language(tmp_path / "run", model, path, path), tmp_path / "run", capsys)
    where = "with which texts are padded" if token == "[PAD]" else "in example 6 of the training split"
    assert f"The token {token!r} {where} has the number {len(PIECES)}, and the embedding of" in said
    assert f"has {len(PIECES)} rows" in said
    assert f"resize_token_embeddings({len(PIECES) + 1})" in said


def test_token_types_that_the_model_does_not_know_and_no_token_to_pad_with_are_refused() -> None:
    limits = Limits("m", None, 10, 1)
    tokens = datasets.Dataset.from_dict({"input_ids": [[1], [2, 3]], "token_type_ids": [[0], [0, 1]]})
    with pytest.raises(AFLoRAError, match=r"Example 2 of it has tokens of 2 types .*'m' knows 1"):
        limits.check_tokens(make_small_tokenizer(), tokens, "it")
    Limits("m", None, 10, None).check_tokens(make_small_tokenizer(), tokens, "it")
    tokenizer = make_small_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(AFLoRAError, match="The tokenizer of 'm' has no token to pad with"):
        limits.check_padding(tokenizer)


def test_the_seed_of_the_last_rank_has_to_be_one(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_small_language_model(tmp_path / "model")
    arguments = language(tmp_path / "run", model, train, train, **{"train.seed": 2**32 - 1})
    assert plan_main([*arguments, "--ranks", "2"]) == 2
    assert "train.seed=4294967295 is too large for 2 processes" in capsys.readouterr().err
    assert plan_main([*arguments, "--ranks", "1", "2"]) == 0  # where it is refused for one of them, it says so


def test_texts_that_end_more_often_than_others_are_refused_where_the_end_is_looked_at() -> None:
    config = AutoConfig.for_model(
        "t5", d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=40, eos_token_id=3, num_labels=2
    )
    config.decoder_start_token_id = 0
    model = AutoModelForSequenceClassification.from_config(config)
    limits, rows = Limits.of(model, "t5"), [[7, 8, 3], [7, 3, 3]]
    with pytest.raises(ValueError, match="same number of <eos>"):  # transformers' own, in the middle of training
        model(input_ids=torch.tensor(rows))
    with pytest.raises(AFLoRAError, match="Example 2 of it has the token '</s>' 2 times, and example 1 1 times"):
        limits.check_tokens(make_small_tokenizer(), datasets.Dataset.from_dict({"input_ids": rows}), "it")


@pytest.mark.distributed
def test_two_ranks_refuse_it_before_the_directory_is_claimed(tmp_path: Path, train: Path) -> None:
    model = make_small_language_model(tmp_path / "model")
    arguments = language(tmp_path / "run", model, train, train, **{"train.seed": 2**32 - 1})
    done = launch("ddp", 2, *MAIN_JOB, *arguments)
    assert done.returncode != 0
    assert "train.seed=4294967295 is too large for 2 processes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
