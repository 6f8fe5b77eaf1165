"""Training data for language models: which columns are understood, and the conversations that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa

from ...errors import AFLoRAError
from ...options import DataConfig
from ...processes import first_on_node
from ...untrusted import load_json
from ..reading import exact, listed, read_table, told_apart
from ..splits import at_most, load_from_hub
from .problems import word_problems

# Columns that make an example, those that may stand beside them, and those that only a prompt needs.
_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (("messages",), ("tools",), ("messages",)),
    (("prompt", "completion"), ("tools",), ("prompt",)),
    (("instruction", "output"), ("input",), ("instruction",)),
    (("text",), (), ()),
)
_COLUMNS = {"answer", *(column for needed, beside, _ in _FORMS for column in (*needed, *beside))}
_ACCEPTED = (
    '"messages" (a chat: a list of {"role", "content"}); "prompt" and "completion" (texts or messages), both with or '
    'without "tools"; "instruction", "input" (may be missing) and "output"; or "text"'
)
# What others call them. Templates write any role as it is, and would learn nothing from these.
_OTHER_ROLES = dict.fromkeys(("human", "user"), "user") | {"system": "system"}
_OTHER_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "assistant"), "assistant")
Turn = dict[str, Any]


def load_examples(config: DataConfig, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Examples to train on and to evaluate with, with their understood columns alone. A collective.

    Raises:
        AFLoRAError: On every rank: there is none, or its columns are not understood; the message says what is.
    """
    datasets.disable_progress_bars()
    if (config.name is None) == (config.train_file is None):
        raise AFLoRAError(
            "data.task=sft needs data.train_file (JSON lines, JSON, parquet or CSV) or data.name (a data set of the "
            "hub, or demo), one of the two."
        )
    if config.name is not None:
        train, held = _by_name(config.name)
    else:
        assert config.train_file is not None
        train, held = _from_file(config.train_file, trained=True), None
    if config.validation_file is not None:
        held = _from_file(config.validation_file, trained=False)
    where, evaluated = config.name or config.train_file, config.validation_file
    if held is None or config.hold_out:
        if not 0 < config.hold_out < len(train):
            raise AFLoRAError(
                f"{where} has no examples for evaluation: name data.validation_file, or say with data.hold_out how "
                f"many of its {len(train)} examples shall serve as such."
            )
        parts = train.train_test_split(test_size=config.hold_out, seed=seed)
        train, held, evaluated = parts["train"], parts["test"], None
    train = _understood(train, f"{where}", trained=True)
    held = _understood(held, f"{evaluated or where} (evaluation)", trained=False)
    return at_most(config.max_train_examples, train, seed), at_most(config.max_eval_examples, held)


def _by_name(name: str) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    if name == "demo":
        return word_problems(512, seed=0), word_problems(64, seed=1)

    loaded = load_from_hub(name, otherwise="use data.train_file and data.validation_file")
    if "train" not in loaded:
        raise AFLoRAError(f"The data set {name!r} has no split named train; it has: {', '.join(loaded)}.")
    held = next((loaded[split] for split in ("validation", "test") if split in loaded), None)
    return _each_as_itself(loaded["train"]), None if held is None else _each_as_itself(held)


def _each_as_itself(dataset: datasets.Dataset) -> datasets.Dataset:
    """The hub's rows, without the keys that others of the same Arrow table have."""
    fields = [field for field in dataset.data.schema if field.name in _COLUMNS]
    nested = {field.name: pa.types.is_nested(field.type) for field in fields}

    def tell(table: pa.Table) -> pa.Table:
        return pa.table({n: told_apart(table.column(n)) if nested[n] else table.column(n) for n in nested})

    if any(nested.values()):
        others = [name for name in dataset.column_names if name not in nested]
        dataset = dataset.with_format("arrow")
        dataset = first_on_node(lambda: dataset.map(tell, batched=True, remove_columns=others)).with_format(None)
    return exact(dataset)


def _from_file(name: str, trained: bool) -> datasets.Dataset:
    """A file's examples, checked row by row."""
    table = read_table(name, _COLUMNS)
    chosen = [column for column in _choose(table.columns, table.name, trained) if column != "answer"]
    for column in chosen:
        if column == "text":
            table.check_text(column)
        elif column not in ("input", "completion", "output", "tools"):
            table.check_filled(column)
    if "messages" in chosen or not all(map(table.is_text, chosen)):
        for place, row in enumerate(table.rows.select_columns(chosen)):
            try:
                turns(row, None)
                tools(row)
            except ValueError as error:
                raise AFLoRAError(f"{table.where(place)}: {error}.") from None
    return table.rows


def _understood(dataset: datasets.Dataset, where: str, trained: bool) -> datasets.Dataset:
    if len(dataset) == 0:
        raise AFLoRAError(f"{where} is empty.")
    return dataset.select_columns(_choose(dataset.column_names, where, trained))


def _choose(found: Sequence[str], where: str, trained: bool) -> list[str]:
    """Those columns that make an example. What is only to be answered needs no completion, but an answer."""
    columns = set(found)
    answer = [] if trained or "answer" not in columns else ["answer"]
    for needed, beside, prompt in _FORMS:
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
    if "messages" in row:
        found = _messages(row["messages"], "messages")
    elif "prompt" in row:
        found = _spoken(row["prompt"], "user", "prompt") + _spoken(row.get("completion"), "assistant", "completion")
    else:
        asked, given = row["instruction"], row.get("input")
        if given is not None and not (isinstance(given, str) and isinstance(asked, str)):
            raise ValueError(f"column {'input' if isinstance(asked, str) else 'instruction'} holds no text")
        asked = f"{asked}\n\n{given}" if given else asked
        found = _spoken(asked, "user", "instruction") + _spoken(row.get("output"), "assistant", "output")
    if not found:
        raise ValueError("nothing is said in it")
    if system is not None and found[0]["role"] != "system":
        found = [{"role": "system", "content": system}, *found]
    return found


def tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The functions that the assistant may call, as JSON schemas; None: none are named.

    Raises:
        ValueError: They are something else.
    """
    found = row.get("tools")
    if isinstance(found, str):  # as JSON, for Arrow would give one the keys of the others
        try:
            found = load_json(found) if found.strip() else None
        except ValueError:
            raise ValueError("column tools holds no JSON") from None
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise ValueError("column tools holds no list of functions (JSON schemas)")
    return found


def question(row: Mapping[str, Any]) -> str:
    """What somebody other than the assistant says last."""
    said = [turn.get("content") for turn in turns(row, None) if turn["role"] != "assistant"]
    parts = said[-1] if said and isinstance(said[-1], list) else said[-1:]
    return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in parts)


def _spoken(value: Any, role: str, column: str) -> list[Turn]:
    if role == "assistant" and (value is None or value == ""):  # a cell of a CSV file has no other way to be missing
        return []
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, column)


def _messages(value: Any, column: str) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
        raise ValueError(f'column {column} holds neither text nor a list of {{"role", "content"}}')
    for turn in value:
        role, content = turn.get("role"), turn.get("content")
        meant = _OTHER_ROLES.get(role.strip().lower()) if isinstance(role, str) else "user"
        if meant is not None and role != meant:
            raise ValueError(f'column {column} has the role {role!r}; roles are "system", "user" and "assistant"')
        calls = any(part is not None for key, part in turn.items() if key != "role")
        if not isinstance(content, str | list) and not (content is None and calls):  # of a tool
            raise ValueError(f"column {column} has a turn of the {role} whose content is no text")
    return list(value)
