"""What the labels of your own files stand for: class numbers, class names, or numbers to regress to.

The whole column of the training file decides, and that of the validation file has to fit:

- Floats, or cells of CSV and TSV that are all numbers, one at least written as a float ("0.5", "1e-3", "1.0"): numbers
  to regress to, unless the user says that they are classes ("0.0" and "1.0" are what pandas makes of class numbers
  beside a missing one).
- Whole numbers without sign or leading zeros, of which at least half of those from 0 to the largest occur: class
  numbers. They keep their numbers, so that there are as many classes as the largest and one. False and true of JSON and
  parquet are 0 and 1.
- All else: class names, numbered in alphabetical order, and by their size where all are whole numbers. "01" and "1" are
  two names, and so are "True" and "true".

Cells that are almost numbers (a decimal comma, a percent sign, "NA" or text among numbers) are refused, and so are
names that look the same.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import pyarrow as pa

from ..errors import AFLoRAError
from .reading import Rows, listed, shown

_WHOLE = re.compile("0|[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")  # also 01, and 1.
_SIGNED = re.compile("[+-]?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_ALMOST = re.compile(r"[+-]?[0-9][0-9.,' ]*\s?%?")
_LARGEST = 1e18  # float32, in which losses are, ends at 3e38: room for the sum of a batch's squares
_MISSING = re.compile(r"nan|inf|infinity|na|#?n/a|<na>|null|#null!|nil|none|[?.]|\\n")


@dataclass(frozen=True)
class _Column:
    """A file's labels: numbers, or text, which of class numbers is "0", "1", ..."""

    table: Rows
    name: str
    kind: Literal["numbers", "class numbers", "names", "cells"]
    values: Sequence[Any]

    def where(self, row: int) -> str:
        return f"{self.table.where(row)}, column {self.name!r}"


def encode_labels(
    tables: dict[str, Rows], column: str, regression: bool | None = None
) -> tuple[list[str] | None, dict[str, list[Any]]]:
    """Class names by number (None for regression), and each split's labels as class numbers, or as floats.

    Args:
        tables: Those of the splits "train" and "validation".
        regression: What the user says they are: numbers to regress to; classes, whose 1.0 is 1; None: as above.

    Raises:
        AFLoRAError: A label that is missing, of another kind than others, not finite, or not among those of the
            training file, with its line; a training file with one class only.
    """
    parts = {split: [_column(part, column) for part in table.parts or (table,)] for split, table in tables.items()}
    if regression is False:
        parts = {split: [_as_classes(part) for part in those] for split, those in parts.items()}
    numbers = bool(regression) or any(part.kind == "numbers" for part in parts["train"])
    if not regression and (cells := [part for part in parts["train"] if part.kind == "cells"]):
        table = replace(tables["train"], parts=tuple(part.table for part in cells))
        numbers |= _are_numbers(_joined(table, cells)) and regression is None
    for one, other in itertools.combinations(itertools.chain(*parts.values()), 2):
        if not regression and not _go_together(one.kind, other.kind, numbers):
            raise AFLoRAError(
                f"Column {column!r} holds labels of different kinds: {one.kind} in {one.table.name}, {other.kind} in "
                f"{other.table.name}."
            )
    columns = {split: _joined(tables[split], those) for split, those in parts.items()}
    if numbers:
        return None, {split: _floats(labels) for split, labels in columns.items()}
    train = columns["train"]
    names = _class_names(columns, column)
    place = {name: number for number, name in enumerate(names)}
    numbered = {}
    for split, labels in columns.items():
        for row, label in enumerate(labels.values):
            if label not in place:
                value = as_number(label)
                meant = None if value is None else _class_of(value)
                hint = " data.regression=false takes 1.0 for 1." if meant in place else ""
                raise AFLoRAError(
                    f"{labels.where(row)}: it has the label {shown(label)}, which the training file "
                    f"{train.table.name} does not have. Its labels are: {listed(names)}.{hint}"
                )
        numbered[split] = [place[label] for label in labels.values]
    return names, numbered


def given_labels(table: Rows, column: str, names: list[str] | None) -> tuple[list[float | None], int | None, bool]:
    """The labels that a file has which a trained model is to label, to compare with.

    Args:
        names: Of the classes that the model knows, by number; None: numbers were regressed to.

    Returns:
        Class numbers, or values; None where a row has none, or one that the model does not know. The first row with one
        that it does not know. Whether labels are numbers of classes that have other names, as in GLUE's files.
    """
    place = {name: number for number, name in enumerate(names or ())}
    written = [(float(name), at) for name, at in place.items() if _DECIMAL.fullmatch(name.strip())]
    by_value = dict(written) if len(dict(written)) == len(written) else {}
    by_place = {} if written else {str(at): at for at in place.values()}  # a file may hold numbers, as GLUE's do
    found: list[float | None] = []
    unknown, numbered = None, False
    kind = table.rows.features[column]
    own = dict(enumerate(kind.names)) if isinstance(kind, datasets.ClassLabel) and names is not None else {}
    for row, number_or_name in enumerate(table.rows[column][:]):
        value = own.get(number_or_name, number_or_name)
        text = str(int(value)) if isinstance(value, bool) else str(value)
        number = as_number(text)
        near = (text, text.strip(), "" if number is None else _class_of(number))
        label = number if names is None else next((place[name] for name in near if name in place), None)
        if names is not None and label is None and number is not None:
            label = by_value.get(number, by_place.get(_class_of(number)))
            numbered |= label is not None and not by_value
        found.append(label)
        if label is None and value is not None and text.strip() and unknown is None:
            unknown = row
    return found, unknown, numbered


def as_number(cell: str) -> float | None:
    """What a cell stands for that is written as a number; NaN and infinity are none.

    >>> as_number(" 1e-3"), as_number("1,5"), as_number("007"), as_number("nan")
    (0.001, None, None, None)
    """
    return float(cell) if _NUMBER.fullmatch(cell.strip()) else None


def _column(table: Rows, column: str) -> _Column:
    table.check_filled(column)
    kind, values = table.type(column), table.rows[column][:]
    if table.is_text(column):
        if (blank := next((row for row, label in enumerate(values) if not label.strip()), None)) is not None:
            raise AFLoRAError(f"{table.where(blank)}: it has nothing in column {column!r}.")
        if not table.untyped:
            return _Column(table, column, "names", values)
        cells = [cell.strip() if _WHOLE.fullmatch(cell.strip()) else cell for cell in values]
        return _Column(table, column, "cells", cells)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return _Column(table, column, "class numbers", [str(int(value)) for value in values])
    if pa.types.is_floating(kind):
        return _Column(table, column, "numbers", values)
    row = next((row for row, value in enumerate(values) if isinstance(value, list | dict)), 0)
    said = "a list" if isinstance(values[row], list) else "an object" if isinstance(values[row], dict) else kind
    raise AFLoRAError(
        f"{table.where(row)}, column {column!r}: {shown(str(values[row]))} ({said}) is no label. Write labels as "
        f"text, or as whole numbers or floats."
    )


def _joined(table: Rows, parts: list[_Column]) -> _Column:
    if len(parts) == 1:
        return parts[0]
    kind = next((part.kind for part in parts if part.kind == "names"), parts[0].kind)
    return _Column(table, parts[0].name, kind, [value for part in parts for value in part.values])


def _as_classes(labels: _Column) -> _Column:
    """Numbers as the names of classes, 1.0 as 1."""
    if labels.kind == "numbers":
        texts = [_class_of(value) for value in _floats(labels)]
        return _Column(labels.table, labels.name, "class numbers", texts)
    if labels.kind == "cells":
        texts = []
        for cell in labels.values:
            value = None if _SIGNED.fullmatch(cell.strip()) else as_number(cell)
            texts.append(cell if value is None else _class_of(value))
        return _Column(labels.table, labels.name, "cells", texts)
    return labels


def _class_of(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _go_together(one: str, other: str, numbers: bool) -> bool:
    if numbers:
        return "names" not in (one, other)
    return one == other or ("cells" in (one, other) and other != "numbers")


def _are_numbers(labels: _Column) -> bool:
    """Whether the cells of a column are to be regressed to; an AFLoRAError where some almost are."""
    cells = labels.values
    if all(_SIGNED.fullmatch(cell.strip()) for cell in cells):
        return False
    values = [as_number(cell) for cell in cells]
    odd = [row for row, value in enumerate(values) if value is None]
    if not odd:
        return True
    missing = all(_MISSING.fullmatch(cells[row].strip().lower().lstrip("+-")) for row in odd)
    numbers = [row for row, value in enumerate(values) if value is not None]
    example = next((row for row in numbers if missing or "." in cells[row]), None)
    if example is not None:
        file = labels.table.where(odd[0]).rpartition(", ")[0]
        other = labels.table.where(example).removeprefix(f"{file}, ")
        said = f"is no number, but {shown(cells[example])} ({other}) is one"
    elif all(_ALMOST.fullmatch(cells[row].strip()) and set(cells[row]) & set(",%' ") for row in odd):
        said = "is almost a number"
    else:
        return False
    raise AFLoRAError(
        f"{labels.where(odd[0])}: the label {shown(cells[odd[0]])} {said}. Write numbers as 0.5, name classes so that "
        f"no name looks like a number, and leave rows without a label out."
    )


def _floats(labels: _Column) -> list[float]:
    """The labels as finite numbers."""
    found = []
    for row, value in enumerate(labels.values):
        wanted = as_number(value) if isinstance(value, str) else value
        if wanted is None or not math.isfinite(wanted):
            raise AFLoRAError(f"{labels.where(row)}: the label {shown(str(value))} is no finite number to regress to.")
        if abs(wanted) > _LARGEST:
            raise AFLoRAError(
                f"{labels.where(row)}: the label {shown(str(value))} is too large to regress to: its square is beyond "
                f"float32. Scale the labels; around 1 is best."
            )
        found.append(float(wanted))
    return found


def _class_names(columns: dict[str, _Column], column: str) -> list[str]:
    train = columns["train"]
    names = set(train.values)
    if len(names) < 2:
        raise AFLoRAError(f"Column {column!r} of the training file {train.table.name} holds one class only.")
    if train.kind != "names" and all(_WHOLE.fullmatch(name) for name in names):
        count = max(map(int, names)) + 1
        others = {text for labels in columns.values() for text in labels.values}
        seen = {int(text) for text in names | others if _WHOLE.fullmatch(text) and int(text) < count}
        if len(seen) * 2 >= count:
            return [str(i) for i in range(count)]
    looks: dict[str, str] = {}  # look -> name
    for name in sorted(names, key=len):
        other = looks.setdefault(_look(name), name)
        if other != name:
            raise AFLoRAError(
                f"{train.where(list(train.values).index(name))}: the label {name!a} differs from {other!a} by blanks "
                f"alone, or by what is not seen. Write them alike."
            )
    whole = all(_SIGNED.fullmatch(name) and len(name) < 1000 for name in names)
    return sorted(names, key=lambda name: (int(name) if whole else 0, name))


def _look(name: str) -> str:
    """A name without the blanks around it, and without characters that are not seen."""
    return "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf").strip()
