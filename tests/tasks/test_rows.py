"""A row is what was written in it, whatever other rows hold: what the chat template makes of it is what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aflora_dist import AFLoRAError
from aflora_dist.options import DataConfig
from aflora_dist.tasks.sft.encode import Encoder
from aflora_dist.tasks.sft.examples import load_examples
from tests.small_lm import make_small_tokenizer
from tests.tasks.chats import chat_tokenizer

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
        turn = {"content"} if "role" in value else set()  # which each has, and templates ask for
        return {key: without_nulls(part) for key, part in value.items() if part is not None or key in turn}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def in_a_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With keys in the table's order, which pyarrow before 22 makes that of the alphabet; no nulls: whether one was
    written cannot be told there."""
    found: list[dict[str, Any]] = without_nulls(pa.Table.from_pylist(rows).to_pylist())
    return found


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
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split, "test": split})
        found = load_examples(DataConfig(task="sft", name="someone/something"), seed=0)[0]
    assert [row["messages"] for row in found] == [row["messages"] for row in without_nulls(rows)]
    if case != "whole and not":  # which a table's type decides
        assert rendered(found) == rendered(in_a_table(rows))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_template_sees_the_nulls_and_the_tools_that_were_written(as_text: bool, suffix: str, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    rows = [{"messages": row["messages"], "tools": tools} for row in chats([{"a": 1}])[:1]]
    kept = [{**row, "tools": json.dumps(tools)} for row in rows] if as_text else rows
    path = tmp_path / f"chats.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(kept), path)
    else:
        path.write_text("\n".join(map(json.dumps, kept)))
    wanted = {**(in_a_table(rows)[0] if suffix == "parquet" else rows[0]), **({"tools": tools} if as_text else {})}
    template = (
        "{{ tools | tojson }}{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    )
    encode = Encoder(chat_tokenizer("bytes", template), 10_000, "completions", None, "it")
    for loss_on in ("completions", "all"):
        encode.loss_on = loss_on
        found = encode(loaded(path)[:])
        assert encode.tokenizer.decode(found["input_ids"][0]) == encode.tokenizer.apply_chat_template(
            wanted["messages"], tools=wanted["tools"], tokenize=False
        )
        assert found["notes"] == [0]


@pytest.mark.parametrize("tools", ["[", "3", [3], {"a": 1}])
def test_tools_of_another_kind_are_refused_with_their_line(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": chats([])[0]["messages"], "tools": tools}))
    with pytest.raises(AFLoRAError, match=r"line 1: column tools holds no"):
        loaded(path)


def test_what_no_json_holds_is_refused_with_its_column(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": b"\xff"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    with pytest.raises(ValueError, match=r"column 'messages': its type list<.*binary.* is not known here"):
        loaded(tmp_path / "chats.parquet")
