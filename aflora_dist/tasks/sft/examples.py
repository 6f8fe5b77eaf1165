"""Training data for language models: which columns are understood, and the conversations that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import pyarrow as pa

from ...errors import AFLoRAError
from ...options import DataConfig
from ...untrusted import load_json
from ..reading import Rows, as_json_column, exact, listed, read_table
from ..sources import at_most, evaluation_rows, refuse_unknown_columns, split_off, training_rows
from .problems import word_problems

# Columns that make an example, those that may stand beside them, and those that only a prompt needs.
_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (("messages",), ("tools", "system"), ("messages",)),
    (("conversations",), ("tools", "system"), ("conversations",)),
    (("prompt", "completion"), ("tools", "system"), ("prompt",)),
    (("instruction", "output"), ("input", "system"), ("instruction",)),
    (("text",), (), ()),
)
_COLUMNS = {"answer", *(column for needed, beside, _ in _FORMS for column in (*needed, *beside))}
_ACCEPTED = (
    '"messages" (a chat: a list of {"role", "content"}); "conversations" (likewise, or of {"from", "value"}); "prompt" '
    'and "completion" (texts or messages), all with or without "tools"; "instruction", "input" (may be missing) and '
    '"output"; or "text". data.columns says which columns stand for these'
)
# What others call them. Templates write any role as it is, and would learn nothing from these.
_OTHER_ROLES = dict.fromkeys(("human", "user"), "user") | {"system": "system"}
_OTHER_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "assistant"), "assistant")
# Who speaks in a turn that has "from" and "value" (ShareGPT).
_SHAREGPT = _OTHER_ROLES | dict.fromkeys(("tool", "function", "observation", "function_response"), "tool")
_SHAREGPT |= {"function_call": "assistant"}
# What a turn may hold in the place of content, and what a tool's may that returns nothing.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_INSTEAD = ("tool_calls", "function_call", *THOUGHTS)
_OF_TOOLS = ("tool_call_id", "name", "id")
Turn = dict[str, Any]


def load_examples(config: DataConfig, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Examples to train on and to evaluate with, with their understood columns alone. A collective.

    Raises:
        AFLoRAError: On every rank: there is none, or its columns are not understood; the message says what is.
    """
    datasets.disable_progress_bars()
    config.refuse_columns()
    if config.name == "demo":
        tables, parts, train = [], [], word_problems(512, seed=0)
        held = word_problems(64, seed=1)
    else:
        tables = training_rows(config, _COLUMNS)
        parts = [(_examples(table, True, config), weight) for table, weight in tables]
        train = _alike([rows for rows, _ in parts])
        held = None
    if config.name != "demo" or config.validation_file is not None:
        table = evaluation_rows(config, _COLUMNS)
        refuse_unknown_columns(config, [*(table for table, _ in tables), table])
        held = None if table is None else _examples(table, False, config)
    where = config.name or str(config.train_file)
    train, held = split_off(config, train, [(len(rows), weight) for rows, weight in parts], held, seed, where)
    train = train.select_columns(_choose(train.column_names, where, True, config))
    held = held.select_columns(_choose(held.column_names, where, False, config))
    return at_most(config.max_train_examples, train, seed), at_most(config.max_eval_examples, held)


def load_prompts(name: str, config: DataConfig) -> tuple[Rows, datasets.Dataset]:
    """A file of what a language model is to be asked: its rows, with empty answers where it has none; and the prompts.

    Raises:
        AFLoRAError: On every rank: a row is no prompt; with its line.
    """
    table = read_table(name, {*_COLUMNS, *config.columns.values()}).renamed(config.columns)
    if "answer" not in table.columns:
        if not any({*table.columns} >= {*(prompt or needed)} for needed, _, prompt in _FORMS):  # or no column at all
            _choose(table.columns, table.name, False, config)
        rows = table.rows.add_column("answer", [""] * len(table.lines))
        table = replace(table, columns=[*table.columns, "answer"], rows=rows)
    prompts = _examples(table, False, config)
    if "text" in prompts.column_names:
        raise AFLoRAError(
            f"{name} has no column of prompts (messages, prompt, instruction), and plain text is not answered. "
            f"data.columns says which column stands for one of these."
        )
    return table, prompts.remove_columns("answer").add_column("answer", [0] * len(prompts))  # so that all are asked


def _examples(table: Rows, trained: bool, config: DataConfig) -> datasets.Dataset:
    """The columns of a table that make examples, checked row by row where there are lines to be told."""
    chosen = [column for column in _choose(table.columns, table.name, trained, config) if column != "answer"]
    for column in chosen:
        if column == "text":
            table.check_text(column)
        elif column not in ("input", "completion", "output", "tools", "system"):
            table.check_filled(column)
    if {"messages", "conversations", "tools"} & {*chosen} or not all(map(table.is_text, chosen)):
        for place, row in enumerate(table.rows.select_columns(chosen)):
            try:
                turns(row, None)
                tools(row)
            except ValueError as error:
                raise AFLoRAError(f"{table.where(place)}: {error}.") from None
    return table.rows.select_columns([*chosen, *(name for name in ("answer",) if name in table.columns)])


def _alike(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Several data sets as one: all as chats, where they say otherwise what an example is, or all plain text."""
    if all(part.features == parts[0].features for part in parts):
        return exact(datasets.concatenate_datasets(list(parts))) if len(parts) > 1 else parts[0]
    plain = ["text" in part.column_names for part in parts]
    if all(plain):
        return exact(datasets.concatenate_datasets([part.select_columns("text") for part in parts]))
    if any(plain):
        raise AFLoRAError("data.mix: some of what is mixed is plain text (a column text), and some is not.")

    def texts(part: datasets.Dataset, what: Any) -> pa.Array:
        return pa.array([json.dumps(what(row), ensure_ascii=False, default=str) for row in part], pa.string())

    meant = {"messages": lambda row: turns(row, None), "tools": tools}
    if any("answer" in part.column_names for part in parts):  # for what is held out
        meant["answer"] = lambda row: row.get("answer")
    columns = {n: as_json_column(pa.chunked_array([texts(part, what) for part in parts])) for n, what in meant.items()}
    return exact(datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns))))


def is_understood(columns: Sequence[str]) -> bool:
    """Whether a language model can be trained on what has these columns, and no label beside a text."""
    return any(set(columns).issuperset(needed) for needed, _, _ in _FORMS) and "label" not in columns


def _choose(found: Sequence[str], where: str, trained: bool, config: DataConfig) -> list[str]:
    """Those columns that make an example. What is only to be answered needs no completion, but an answer.

    A form of which data.columns names a column goes before others.
    """
    columns = set(found)
    answer = [] if trained or "answer" not in columns else ["answer"]
    for needed, beside, prompt in sorted(_FORMS, key=lambda form: not config.columns.keys() & {*form[0]}):
        if columns.issuperset(needed):
            return [*needed, *(c for c in beside if c in columns), *(answer if prompt else [])]
        if answer and prompt and columns.issuperset(prompt):
            return [*prompt, *(c for c in beside if c in columns), *answer]
    only_asked = ' For evaluation a prompt and its "answer" will do.' if not trained else ""
    raise AFLoRAError(
        f"{where} has the columns {listed(found)}, which are none of what is understood: {_ACCEPTED}.{only_asked}"
    )


def turns(row: Mapping[str, Any], system: str | None) -> list[Turn]:
    """The conversation that a row without the column text stands for.

    Args:
        system: What the system says first, where nothing else is said.

    Raises:
        ValueError: Something in it is of another kind.
    """
    if "messages" in row or "conversations" in row:
        column = "messages" if "messages" in row else "conversations"
        found = _messages(row[column], column)
    elif "prompt" in row:
        found = _spoken(row["prompt"], "user", "prompt") + _spoken(row.get("completion"), "assistant", "completion")
    else:
        asked, given = row["instruction"], row.get("input")
        if given is not None and not (isinstance(given, str) and isinstance(asked, str)):
            raise ValueError(f"column {'input' if isinstance(asked, str) else 'instruction'} holds no text")
        asked = f"{asked}\n\n{given}" if given else asked
        found = _spoken(asked, "user", "instruction") + _spoken(row.get("output"), "assistant", "output")
    if not found:
        raise ValueError("nothing is said in it; leave it out")
    if (said := row.get("system")) is not None and not isinstance(said, str):
        raise ValueError("column system holds no text")
    system = said or system
    if system is not None and found[0]["role"] != "system":
        found = [{"role": "system", "content": system}, *found]
    return found


def tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The functions that the assistant may call, as JSON schemas; None: none are named. Else a ValueError."""
    found = row.get("tools")
    if isinstance(found, str):  # as JSON, for Arrow would give one the keys of the others
        try:
            found = load_json(found) if found.strip() else None
        except ValueError:
            raise ValueError("column tools holds no JSON") from None
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise ValueError("column tools holds no list of functions (JSON schemas)")
    if found and not all(isinstance(tool.get("function", {}), dict) for tool in found):
        raise ValueError("column tools has a function that is no JSON schema")
    return found or None


def is_learned(turn: Turn) -> bool:
    """Whether a turn is the assistant's and to be learned: it says something, and nothing in it says otherwise.

    Files mark a turn that is given and not learned by weight 0 (OpenAI's fine-tuning) or train false (ShareGPT's kind).
    """
    if turn["role"] != "assistant" or turn.get("weight") == 0 or turn.get("train") == 0:
        return False
    content = turn.get("content")
    parts = content if isinstance(content, list) else [content]
    said = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    return any(not isinstance(part, str | None) or (part or "").strip() for part in said) or any(
        turn.get(key) for key in _INSTEAD
    )


def question(row: Mapping[str, Any]) -> str:
    """What somebody other than the assistant says last."""
    said = [turn.get("content") for turn in turns(row, None) if turn["role"] != "assistant"]
    parts = said[-1] if said and isinstance(said[-1], list) else said[-1:]
    return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in parts)


def _spoken(value: Any, role: str, column: str) -> list[Turn]:
    if role == "assistant" and (value is None or value == ""):  # a cell of a CSV file has no other way to be missing
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    said = _messages(value, column)
    if role == "user":  # a prompt: what the assistant says in it is no completion
        said = [{"train": False, **turn} if turn["role"] == "assistant" else turn for turn in said]
    return said


def _messages(value: Any, column: str) -> list[Turn]:
    known = isinstance(value, list) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
    )
    if not known:
        raise ValueError(f'column {column} holds neither text nor a list of {{"role", "content"}}')
    found = [turn if "role" in turn else _of_sharegpt(turn, column) for turn in value]
    for turn in found:
        role, content = turn.get("role"), turn.get("content")
        meant = _OTHER_ROLES.get(role.strip().lower()) if isinstance(role, str) else "user"
        if meant is not None and role != meant:
            raise ValueError(f'column {column} has the role {role!r}; roles are "system", "user" and "assistant"')
        _check_calls(turn.get("tool_calls"), column)
        if turn.get("weight") not in (None, 0, 1) or turn.get("train") not in (None, False, True):
            raise ValueError(
                f"column {column} has a turn of weight {turn.get('weight')!r} and train {turn.get('train')!r}: a turn "
                f"is learned (1, true) or not (0, false)"
            )
        beside = _OF_TOOLS if role == "tool" else _INSTEAD
        if not isinstance(content, str | list) and not (content is None and any(turn.get(key) for key in beside)):
            raise ValueError(f"column {column} has a turn of the {role} whose content is no text")
    return found


def _check_calls(calls: Any, column: str) -> None:
    """Raise a ValueError if a turn's tool_calls are no calls of functions, each with its name."""
    named = calls is None or isinstance(calls, list)
    for call in calls or () if named else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        named = named and isinstance(function, dict) and isinstance(function.get("name"), str)
    if not named:
        raise ValueError(f'column {column} has tool_calls that are no list of {{"function": {{"name", "arguments"}}}}')


def _of_sharegpt(turn: Turn, column: str) -> Turn:
    """A turn of {"from", "value"} as one of {"role", "content"}."""
    speaker, said = turn["from"], turn.get("value")
    role = _SHAREGPT.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"column {column} has a turn from {speaker!r}; known are: {', '.join(_SHAREGPT)}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker.strip().lower() != "function_call":
        return {"role": role, "content": said, **others}
    try:
        call = load_json(str(said))
    except (TypeError, ValueError):
        call = None
    if not isinstance(call, dict) or "name" not in call:
        raise ValueError(f'column {column} has a function_call that is no JSON object with "name" and "arguments"')
    return {"role": role, "content": None, "tool_calls": [{"type": "function", "function": call}], **others}
