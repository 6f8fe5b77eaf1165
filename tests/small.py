"""A small model in a folder and small data files, for the main job."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "a", "is", "was", "very", "not"]


def add_by_transformers(model: Any, config: Any) -> None:
    """The model's own add_adapter: transformers 5.24 refuses any PEFT before 0.22."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"transformers adds no adapter with this PEFT: {error}")
        raise


def make_tiny_model(folder: Path) -> Path:
    """A BERT of two small layers without dropout, with its tokenizer, in a folder."""
    folder.mkdir(exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast({token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_reviews(path: Path, rows: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            label = rng.choice(["positive", "negative"])
            mood = WORDS[:3] if label == "positive" else WORDS[3:6]
            count = rng.randint(1, 4)  # of different lengths, by which they are dealt
            pairs = zip(rng.choices(WORDS[6:], k=count), rng.choices(mood, k=count), strict=True)
            writer.writerow([" ".join(word for pair in pairs for word in pair), label])
