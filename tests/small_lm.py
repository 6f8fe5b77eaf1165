"""A small language model with grouped attention in a folder, and small data for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["Ada", "has", "apples", "books", "and", "gives", "how", "many", "The", "answer", "is", ".", "?", "#", "+", "="]
PIECES = ["<pad>", "<unk>", "<s>", "</s>", "Instruction", "Response", ":", " ", "\n", *"0123456789", *WORDS]


def make_small_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words, digits and single spaces, each a token; every text can be told from its tokens."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+|\s|\d|[^\sA-Za-z\d]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast


def make_small_language_model(folder: Path, **options: Any) -> Path:
    """A Llama of two layers with four heads for queries and two for keys and values, tied to its embedding."""
    make_small_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    chosen = {
        "vocab_size": len(PIECES),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # far from uniform, so that what is attended to shows
        **options,
    }
    LlamaForCausalLM(LlamaConfig(**chosen)).save_pretrained(folder)
    return folder


def write_problems(path: Path, rows: int, seed: int, *, answered_only: int = 0) -> None:
    """Prompts and completions of very different lengths; the last `answered_only` rows have an answer alone."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for row in range(rows):
            a, b = chance.randint(1, 9), chance.randint(1, 9)
            prompt = " ".join(
                ["Ada has", str(a), *chance.choices(WORDS[2:6], k=chance.choice([1, 3, 9])), "how many ?"]
            )
            talk = chance.choices(WORDS, k=chance.choice([0, 0, 1, 2, 5, 30]))
            completion = " ".join([*talk, f"The answer is {a + b} ."])
            line: dict[str, Any] = {"prompt": prompt, "completion": completion, "answer": a + b}
            if row >= rows - answered_only:
                line["completion"] = None
            file.write(json.dumps(line) + "\n")
