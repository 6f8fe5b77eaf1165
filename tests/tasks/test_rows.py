"""A row is what was written in it, whatever other rows hold: what the chat template makes of it is what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aflora_dist.tasks.sft.examples import load_examples
from aflora_dist.training.config import DataConfig
from tests.small_lm import make_small_tokenizer

CALLS: dict[str, list[Any]] = {  # arguments of a tool, row by row
    "other keys": [{"city": "Paris"}, {"a": 1, "b": 2}],
    "no key": [{}, {"b": 2}],
    "a null that was written": [{"b": None}, {"b": 2}],
    "whole and not": [{"x": 1}, {"x": 1.5}],
    "lists": [{"x": [1, {"y": 2}]}, {"x": [{"z": "a"}]}],
    "alike": [{"x": 0.1234567890123}, {"x": 2.0}],
}
TEMPLATE = "{% for m in messages %}{{ m | tojson }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def chats(arguments: list[Any]) -> list[dict[str, Any]]:
    def chat(given: Any) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "f", "arguments": given}}
        parts = [{"type": "text", "text": "how"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    image = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]
    return [*({"messages": chat(given)} for given in arguments), {"messages": image}]


def rendered(rows: Any) -> list[str]:
    tokenizer = make_small_tokenizer(TEMPLATE)
    return [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def loaded(path: Path) -> datasets.Dataset:
    return load_examples(DataConfig(task="sft", train_file=str(path), validation_file=str(path)), seed=0)[0]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("case", CALLS)
def test_a_line_is_rendered_as_if_it_stood_alone(case: str, suffix: str, tmp_path: Path) -> None:
    rows = chats(CALLS[case])
    path = tmp_path / f"chats.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    assert rendered(loaded(path)) == rendered(rows)


@pytest.mark.parametrize("source", ["parquet", "hub"])
@pytest.mark.parametrize("case", sorted(set(CALLS) - {"lists"}))  # Arrow has no type for these
def test_no_row_of_a_table_has_the_keys_of_another(
    case: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "more": 1} for row in chats(CALLS[case])]
    if source == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
        found = loaded(tmp_path / "chats.parquet")
    else:
        split = datasets.Dataset(pa.Table.from_pylist(rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split, "test": split})
        found = load_examples(DataConfig(task="sft", name="someone/something"), seed=0)[0]
    wanted = without_nulls(rows)  # one that was written cannot be told from one of the table's
    assert [row["messages"] for row in found] == [row["messages"] for row in wanted]
    if case != "whole and not":  # which a table's type decides
        assert rendered(found) == rendered(wanted)


def test_what_no_json_holds_is_refused_with_its_column(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": b"\xff"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    with pytest.raises(ValueError, match=r"column 'messages': its type list<.*binary.* is not known here"):
        loaded(tmp_path / "chats.parquet")
