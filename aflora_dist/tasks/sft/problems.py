"""Arithmetic word problems that are made up, with worked solutions: the demo's data, from no file and no network."""

from __future__ import annotations

import random

import datasets

_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Lena", "Max", "Nora", "Omar")
_THINGS = ("apples", "books", "marbles", "stickers", "pencils", "shells", "coins", "cards", "buttons", "cookies")


def _bought(chance: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, c = chance.randint(5, 60), chance.randint(2, 30), chance.randint(1, 5)
    return (
        f"{name} has {a} {thing}. A friend gives {name} {b} more, and then {name} loses {c}. "
        f"How many {thing} does {name} have now?",
        f"{name} has {a} + {b} = {a + b} {thing}, and after losing {c} there are {a + b} - {c} = {a + b - c}.",
        a + b - c,
    )


def _boxed(chance: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, c = chance.randint(2, 9), chance.randint(3, 12), chance.randint(1, 20)
    return (
        f"{name} fills {a} boxes with {b} {thing} each and keeps {c} outside. How many {thing} does {name} have?",
        f"In the boxes there are {a} * {b} = {a * b} {thing}. Together with {c} that is {a * b} + {c} = {a * b + c}.",
        a * b + c,
    )


def _shared(chance: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, c = chance.randint(2, 9), chance.randint(2, 12), chance.randint(1, 20)
    whole = a * b + c
    return (
        f"{name} has {whole} {thing}, gives away {c} of them and shares the rest equally among {a} friends. "
        f"How many {thing} does each friend get?",
        f"After giving away {c} there are {whole} - {c} = {a * b} {thing}. Each friend gets {a * b} / {a} = {b}.",
        b,
    )


def word_problems(count: int, seed: int) -> datasets.Dataset:
    """Columns prompt, completion (ends in "The answer is N."), answer. No two data sets of other seeds share one."""
    chance = random.Random(seed)
    rows: dict[str, tuple[str, int]] = {}
    while len(rows) < count:
        # Another seed has other names, so that what is measured with has not been seen.
        name = _NAMES[2 * chance.randrange(len(_NAMES) // 2) + seed % 2]
        prompt, worked, answer = chance.choice((_bought, _boxed, _shared))(chance, name, chance.choice(_THINGS))
        rows[prompt] = (f"{worked} The answer is {answer}.", answer)
    return datasets.Dataset.from_dict(
        {
            "prompt": list(rows),
            "completion": [completion for completion, _ in rows.values()],
            "answer": [answer for _, answer in rows.values()],
        }
    )
