"""Small data sets laid out file by file as on the hub: README.md with its configurations, and folders of parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GSM8K = [
    ("Ada has 3 apples and buys 4 more. How many apples has Ada?", "Ada has 3+4 = <<3+4=7>>7 apples.\n#### 7"),
    (
        "A farm makes 1,000 boxes and 234 more. How many boxes?",
        "It makes 1000+234 = <<1000+234=1234>>1234.\n#### 1,234",
    ),
    ("Ben has 9 books and loses 2. How many books?", "9-2 = <<9-2=7>>7 books.\n#### 7"),
    ("There are 6 coins in each of 2 hands. How many coins?", "6*2 = <<6*2=12>>12 coins.\n#### 12"),
]


def _parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def _readme(folder: Path, head: str) -> Path:
    (folder / "README.md").write_text(f"---\n{head}---\n\n# Dataset card\n")
    return folder


def gsm8k(folder: Path, times: int = 1) -> Path:
    """openai/gsm8k: two configurations, train and test."""
    rows = [{"question": question, "answer": answer} for question, answer in GSM8K]
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            _parquet(folder / config / f"{split}-00000-of-00001.parquet", rows * times if split == "train" else rows)
    entry = "- config_name: {0}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {{0}}/{split}-*\n" for split in ("train", "test")
    )
    return _readme(folder, "license:\n- mit\nconfigs:\n" + entry.format("main") + entry.format("socratic"))


def ultrachat(folder: Path) -> Path:
    """HuggingFaceH4/ultrachat_200k: four splits, none of them named train."""
    chat = [
        {"content": "how many apples ?", "role": "user"},
        {"content": "Ada has 3 .", "role": "assistant"},
        {"content": "and books ?", "role": "user"},
        {"content": "The answer is 4 .", "role": "assistant"},
    ]
    splits = ("train_sft", "test_sft", "train_gen", "test_gen")
    for split in splits:
        rows = [{"prompt": chat[0]["content"], "prompt_id": f"{i:064x}", "messages": chat} for i in range(8)]
        _parquet(folder / "data" / f"{split}-00000-of-00001-abc.parquet", rows)
    entries = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    return _readme(folder, f"language:\n- en\nconfigs:\n- config_name: default\n  data_files:\n{entries}")


def sharegpt(folder: Path) -> Path:
    """A ShareGPT data set, one JSON file and no configuration."""
    turns = [
        {"from": "system", "value": "answer ."},
        {"from": "human", "value": "how many apples ?"},
        {"from": "gpt", "value": "Ada has 3 ."},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"identity_{i}", "conversations": turns} for i in range(6)]
    (folder / "ShareGPT_V3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))
    return _readme(folder, "license: apache-2.0\n")


def ag_news(folder: Path) -> Path:
    """fancyzhang/ag_news: texts, and labels whose names the card has, not in the order of the alphabet."""
    texts = ["great film", "poor plot", "fine day", "bad news"]
    for split, times in (("train", 5), ("test", 2)):
        rows = [{"text": text, "label": number} for number, text in enumerate(texts)] * times
        _parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return _readme(
        folder,
        """dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': World
          '1': Sports
          '2': Business
          '3': Sci/Tech
  splits:
  - name: train
    num_examples: 20
  - name: test
    num_examples: 8
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
""",
    )
