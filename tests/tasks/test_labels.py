"""What labels stand for is decided by the whole column, and what does not fit is named with its line."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aflora_dist import AFLoRAError
from aflora_dist.options import DataConfig
from aflora_dist.tasks.data import Data, load_data
from aflora_dist.tasks.evaluation import odd_evaluation
from aflora_dist.tasks.sources import trained_too
from aflora_dist.training.command_line import parse


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(train: Path, validation: Path | None = None, regression: bool | None = None) -> Data:
    files = {"train_file": str(train), "validation_file": str(validation or train)}
    return load_data(DataConfig(task="files", regression=regression, **files), seed=0)


def csv(path: Path, labels: list[str]) -> Path:
    path.write_text("text,label\n" + "".join(f'a film,"{label}"\n' for label in labels))
    return path


def jsonl(path: Path, labels: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": "a film", "label": label}) + "\n" for label in labels))
    return path


def parquet(path: Path, labels: pa.Array) -> Path:
    pq.write_table(pa.table({"text": ["a film"] * len(labels), "label": labels}), path)
    return path


CELLS: dict[str, tuple[list[str], list[str] | None, list[Any]]] = {
    "class numbers": (["2", "0", "1"], ["0", "1", "2"], [2, 0, 1]),
    "class numbers from 1": (["1", "2", "3"], ["0", "1", "2", "3"], [1, 2, 3]),
    "blanks around them": ([" 1", "0 "], ["0", "1"], [1, 0]),
    "every second one": (["1", "3"], ["0", "1", "2", "3"], [1, 3]),
    "dates as numbers": (["20240102", "20240101", "20240102"], ["20240101", "20240102"], [1, 0, 1]),
    "too sparse": (["404", "1200", "404"], ["404", "1200"], [0, 1, 0]),
    "zip codes": (["01001", "01000"], ["01000", "01001"], [1, 0]),
    "leading zeros beside none": (["1", "01", "1"], ["01", "1"], [1, 0, 1]),
    "signs": (["-1", "1", "0"], ["-1", "0", "1"], [0, 2, 1]),
    "more digits than numbers have": (["9" * 30, "1" * 30], ["1" * 30, "9" * 30], [1, 0]),
    "more than Python takes for one": (["9" * 5000, "1" * 5000], ["1" * 5000, "9" * 5000], [1, 0]),
    "booleans as written": (["True", "true", "False"], ["False", "True", "true"], [1, 2, 0]),
    "exponents among names": (["1e5", "3f2", "1e5"], ["1e5", "3f2"], [0, 1, 0]),
    "leading zeros beside exponents": (["012", "1e5"], ["012", "1e5"], [0, 1]),
    "names and numbers": (["1", "2", "other"], ["1", "2", "other"], [0, 1, 2]),
    "dates": (["2021-01-02", "2021-01-01"], ["2021-01-01", "2021-01-02"], [1, 0]),
    "nan among names": (["naan", "nan"], ["naan", "nan"], [0, 1]),
    "other numerals": (["\u0661", "\u0662"], ["\u0661", "\u0662"], [0, 1]),
    "with a comma": (["a, b", "c"], ["a, b", "c"], [0, 1]),
    "floats": (["0.5", "-1", "2.", ".5", "1e-3", " 3.0"], None, [0.5, -1.0, 2.0, 0.5, 0.001, 3.0]),
    "exponents": (["1e5", "2.5"], None, [100000.0, 2.5]),
}


@pytest.mark.parametrize("case", CELLS)
def test_what_cells_stand_for(case: str, tmp_path: Path) -> None:
    labels, names, numbers = CELLS[case]
    data = load(csv(tmp_path / "train.csv", labels))
    assert data.labels == names
    assert list(data.train["label"]) == list(data.evaluation["validation"]["label"]) == numbers
    assert data.metrics == (("pearson",) if names is None else ("accuracy", "f1")[: 2 if len(names) == 2 else 1])


def test_ten_thousand_rows_do_not_outvote_a_later_one(tmp_path: Path) -> None:
    data = load(csv(tmp_path / "train.csv", ["1"] * 10_500 + ["012", "True"]))
    assert data.labels == ["012", "1", "True"]
    assert data.train[10_500:]["label"] == [0, 2]


REFUSED_CELLS: dict[str, tuple[list[str], str]] = {
    "a decimal comma": (
        ["0.5", "1.5", "1,5"],
        r"line 4, column 'label': the label '1,5' is no number, but '0.5' \(line 2\) is one",
    ),
    "a percent sign": (
        ["50%", "0.5"],
        r"line 2, column 'label': the label '50%' is no number, but '0.5' \(line 3\) is one",
    ),
    "decimal commas only": (
        ["1,5", "2", "2,5"],
        r"line 2, column 'label': the label '1,5' is almost a number. Write numbers as 0\.5",
    ),
    "percent signs only": (["50%", "10 %"], r"line 2, column 'label': the label '50%' is almost a number"),
    "thousands": (["1,000", "1.5"], r"line 2, column 'label': the label '1,000' is no number"),
    "nothing": (["0.5", "", "1.5"], r"line 3: it has nothing in column 'label'"),
    "blanks": (["a", "  ", "b"], r"line 3: it has nothing in column 'label'"),
    "NaN": (["0.5", "NaN", "1.5"], r"line 3, column 'label': the label 'NaN' is no number, but '0.5'"),
    "infinity": (["0.5", "-inf", "1.5"], r"line 3, column 'label': the label '-inf' is no number"),
    "too large": (["0.5", "1e999"], r"line 3, column 'label': the label '1e999' is no finite number"),
    "NA among class numbers": (
        ["0", "1", "NA"],
        r"line 4, column 'label': the label 'NA' is no number, but '0' \(line 2\) is one",
    ),
    "NaN among class numbers": (
        ["nan", "1", "0"],
        r"line 2, column 'label': the label 'nan' is no number, but '1' \(line 3\) is one",
    ),
    "a leading zero among floats": (["0.5", "00.5"], r"line 3, column 'label': the label '00.5' is no number"),
    "a name among floats": (["3.5", "good"], r"line 3, column 'label': the label 'good' is no number"),
    "a blank more": (["a", "b", "a "], r"line 4, column 'label': the label 'a ' differs from 'a' by blanks alone"),
    "a blank that does not break": (["a", "a\u00a0"], r"line 3, .* the label 'a\\xa0' differs from 'a' by"),
    "what is not seen": (["a", "b", "a\u200b"], r"line 4, .* the label 'a\\u200b' differs from 'a' by"),
    "an accent of its own": (["\u00e9", "e\u0301"], r"line 3, .* the label 'e\\u0301' differs from '\\xe9' by"),
    "MySQL's NULL": (["0", "1", r"\N"], r"line 4, column 'label': the label .* is no number, but '0'"),
    "Excel's NA": (["0", "#N/A", "1"], r"line 3, column 'label': the label '#N/A' is no number, but '0'"),
    "one class": (["a", "a"], r"Column 'label' of the training file .* holds one class only"),
    "one number": (["1", "1"], r"holds one class only"),
}


@pytest.mark.parametrize("case", REFUSED_CELLS)
def test_cells_that_are_no_labels_are_refused(case: str, tmp_path: Path) -> None:
    labels, expected = REFUSED_CELLS[case]
    with pytest.raises(AFLoRAError, match=expected):
        load(csv(tmp_path / "train.csv", labels))


TYPED: dict[str, tuple[pa.Array, list[str] | None, list[Any]]] = {
    "text": (pa.array(["b", "a"]), ["a", "b"], [1, 0]),
    "text that looks like numbers": (pa.array(["10", "9"]), ["9", "10"], [1, 0]),
    "text that looks like floats": (pa.array(["0.5", "1.5"]), ["0.5", "1.5"], [0, 1]),
    "category": (pa.array(["b", "a"]).dictionary_encode(), ["a", "b"], [1, 0]),
    "large text": (pa.array(["b", "a"], pa.large_string()), ["a", "b"], [1, 0]),
    "booleans": (pa.array([True, False]), ["0", "1"], [1, 0]),
    "bytes as numbers": (pa.array([1, 0], pa.int8()), ["0", "1"], [1, 0]),
    "sparse": (pa.array([20240102, 20240101]), ["20240101", "20240102"], [1, 0]),
    "signs": (pa.array([1, -1]), ["-1", "1"], [1, 0]),
    "unsigned": (pa.array([2**64 - 1, 2], pa.uint64()), ["2", str(2**64 - 1)], [1, 0]),
    "floats": (pa.array([0.5, 1.0], pa.float32()), None, [0.5, 1.0]),
    "half floats": (pa.array([0.5, 1.0], pa.float16()), None, [0.5, 1.0]),
}


@pytest.mark.parametrize("case", TYPED)
def test_what_typed_labels_stand_for(case: str, tmp_path: Path) -> None:
    labels, names, numbers = TYPED[case]
    data = load(parquet(tmp_path / "train.parquet", labels))
    assert data.labels == names
    assert list(data.train["label"]) == numbers


REFUSED_TYPES: dict[str, tuple[pa.Array, str]] = {
    "date": (
        pa.array([datetime.date(2021, 1, 2)] * 2),
        r"row 1, column 'label': '2021-01-02' \(date32\[day\]\) is no la",
    ),
    "timestamp": (pa.array([datetime.datetime(2021, 1, 2)] * 2), r"\(timestamp\[us\]\) is no label"),
    "duration": (pa.array([datetime.timedelta(1)] * 2), r"\(duration\[us\]\) is no label"),
    "decimal": (
        pa.array([decimal.Decimal("1.5")] * 2),
        r"'1.5' \(decimal128\(2, 1\)\) is no label\. Write labels as text",
    ),
    "bytes": (pa.array([b"a", b"b"]), r"\(binary\) is no label"),
    "list": (pa.array([[1], [2]]), r"\(a list\) is no label"),
    "struct": (pa.array([{"a": 1}, {"a": 2}]), r"\(an object\) is no label"),
    "map": (pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), r"column 'label'.*\(a list\) is no label"),
    "texts by number": (pa.array([["a"], ["b"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))), r"column 'label'"),
    "time": (pa.array([1, 2], pa.time32("s")), r"column 'label'.*time32"),
    "fixed bytes": (pa.array([b"ab", b"cd"], pa.binary(2)), r"column 'label'.*binary"),
    "null": (pa.array([1, 0, None]), r"row 3: it has nothing in column 'label'"),
    "null text": (pa.array(["a", None, "b"]), r"row 2: it has nothing in column 'label'"),
    "no text": (pa.array(["a", "", "b"]), r"row 2: it has nothing in column 'label'"),
    "nulls": (pa.nulls(2), r"row 1: it has nothing in column 'label'"),
    "a null float": (pa.array([0.5, None]), r"row 2: it has nothing in column 'label'"),
    "NaN": (pa.array([0.5, float("nan")]), r"row 2, column 'label': the label 'nan' is no finite number"),
    "infinity": (pa.array([0.5, float("-inf")]), r"row 2, column 'label': the label '-inf' is no finite number"),
}


@pytest.mark.parametrize("case", REFUSED_TYPES)
def test_types_that_are_no_labels_are_refused(case: str, tmp_path: Path) -> None:
    labels, expected = REFUSED_TYPES[case]
    with pytest.raises(AFLoRAError, match=expected):
        load(parquet(tmp_path / "train.parquet", labels))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, [2]], r"line 3, column 'label': '\[2\]' .* is no label"),
        ([{"a": 1}, {"a": "b"}], r"line 1, column 'label': .* is no label"),
        ([0.5, float("nan")], r"line 2, column 'label': the label 'nan' is no finite number"),
        ([0, None], r"line 2: it has nothing in column 'label'"),
        ([0, "1"], r"line 2, column 'label': text \('1'\), where line 1 has a number"),
    ],
)
def test_json_values_that_are_no_labels_are_refused(labels: list[Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError, match=expected):
        load(jsonl(tmp_path / "train.jsonl", labels))


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        (["a", "b"], ["b", "c"], r"dev.csv, line 3, column 'label': it has the label 'c', which .*train.csv does not"),
        (["a", "b"], ["a", "1"], r"line 3, .* the label '1'"),
        (["0", "1"], ["0", "2"], r"line 3, .* the label '2', .* Its labels are: 0, 1\."),
        (["0", "1"], ["0", "01"], r"line 3, .* the label '01'"),
        (["0", "1"], ["0.0", "1.0"], r"line 2, .* the label '0.0'.* data.regression=false takes 1.0 for 1\."),
        (["0.5", "1"], ["0", "good"], r"line 3, column 'label': the label 'good' is no finite number"),
        (["0.5", "1"], ["0", "nan"], r"line 3, column 'label': the label 'nan' is no finite number"),
        ([f"n{i}" for i in range(500)], ["x"], r"Its labels are: n0, n1, .*\.\.\. \(500 in all\)"),
        ([1, 0], ["1", "0"], "different kinds: class numbers in .*train.jsonl, names in .*dev.jsonl"),
        ([1, 0], [0.5], "different kinds: class numbers in .*, numbers in"),
        ([0.5, 1], ["a"], "different kinds: numbers in .*, names in"),
        (["a", "b"], [1], "different kinds: names in .*, class numbers in"),
    ],
)
def test_the_validation_file_has_to_fit(train: list[Any], validation: list[Any], expected: str, tmp_path: Path) -> None:
    typed = not all(isinstance(label, str) for label in [*train, *validation])
    write, suffix = (jsonl, "jsonl") if typed else (csv, "csv")
    with pytest.raises(AFLoRAError, match=expected) as refused:
        load(write(tmp_path / f"train.{suffix}", train), write(tmp_path / f"dev.{suffix}", validation))
    assert len(str(refused.value)) < 600


def test_files_of_different_kinds_fit_where_their_labels_do(tmp_path: Path) -> None:
    cells, typed = tmp_path / "a.csv", tmp_path / "b.jsonl"
    for labels, values, names in (
        (["1", "0"], [1, 0], ["0", "1"]),
        (["1", "0"], ["1", "0"], ["0", "1"]),
        (["1", "0"], [True, False], ["0", "1"]),
        (["b", "a"], ["b", "a"], ["a", "b"]),
        (["0.5", "1"], [0.5, 1.0], None),
        (["0.5", "1"], [2, 1], None),
    ):
        for train, validation in ((cells, typed), (typed, cells)):
            if names is None and values == [2, 1] and train is typed:
                continue
            data = load(*(csv(p, labels) if p is cells else jsonl(p, values) for p in (train, validation)))
            assert data.labels == names
    data = load(csv(tmp_path / "floats.csv", ["0.5", "1"]), csv(tmp_path / "whole.csv", ["0", "1"]))
    assert list(data.evaluation["validation"]["label"]) == [0.0, 1.0]
    few, all_of_them = csv(tmp_path / "few.csv", ["1", "9"]), csv(tmp_path / "all.csv", [str(i) for i in range(10)])
    assert load(few, all_of_them).labels == [str(i) for i in range(10)]  # class numbers, though train has few of them
    numbers = parquet(tmp_path / "c.parquet", pa.array([0.0, 1.0]))
    for labels in (["1", "0"], ["b", "a"]):
        with pytest.raises(AFLoRAError, match=r"different kinds: cells in .*\.csv, numbers in .*\.parquet"):
            load(csv(cells, labels), numbers)


SAID: dict[str, tuple[bool, list[Any], list[Any], list[str] | None, list[Any]]] = {
    "class numbers of pandas": (False, ["0.0", "2.0", "1.0"], [0.0, 1.0, 2.0], ["0", "1", "2"], [0, 2, 1]),
    "classes with signs": (False, ["-1.0", "1"], [-1.0, 1.0], ["-1", "1"], [0, 1]),
    "classes of half stars": (False, ["0.5", "1.0", "1.5"], [0.5, 1.0, 1.5], ["0.5", "1", "1.5"], [0, 1, 2]),
    "many digits": (False, ["9" * 30, "1.0"], [1.0, 1.0], ["1", "9" * 30], [1, 0]),
    "stars": (True, ["1", "5", "3"], [1, 5, 3], None, [1.0, 5.0, 3.0]),
    "whole numbers": (True, ["1.0", "-2.0"], [1.0, -2.0], None, [1.0, -2.0]),
    "numbers as text": (True, ["1.5", "2"], ["1.5", "2"], None, [1.5, 2.0]),
}


def test_kinds_of_labels_and_not_types_decide_what_can_be_mixed(tmp_path: Path) -> None:
    def mixed(*files: Path) -> tuple[list[str] | None, list[Any]]:
        said = {"train_file": str(files[0]), "validation_file": str(files[-1])}
        config = DataConfig(task="files", mix={str(file): 1 for file in files[1:-1]}, **said)
        data = load_data(config, seed=0)
        return data.labels, list(data.train["label"])

    cells, whole = csv(tmp_path / "cells.csv", ["0", "1"]), jsonl(tmp_path / "whole.jsonl", [1, 0])
    short = parquet(tmp_path / "short.parquet", pa.array([1, 0], pa.int8()))
    truths, large = jsonl(tmp_path / "truths.jsonl", [True, False]), tmp_path / "large.parquet"
    pq.write_table(pa.table({"text": pa.array(["a film"], pa.large_string()), "label": pa.array([1])}), large)
    assert mixed(cells, whole, short, truths, large, cells) == (["0", "1"], [0, 1, 1, 0, 1, 0, 1, 0, 1])
    halves, numbers = csv(tmp_path / "halves.csv", ["0.5", "1"]), jsonl(tmp_path / "numbers.jsonl", [2, 0.25])
    assert mixed(halves, cells, numbers, whole, halves) == (None, [0.5, 1, 0, 1, 2, 0.25, 1, 0])
    names, classes = csv(tmp_path / "names.csv", ["b", "a"]), tmp_path / "classes.parquet"
    texts = jsonl(tmp_path / "texts.jsonl", ["a", "c"])
    assert mixed(names, texts, names) == (["a", "b", "c"], [1, 0, 0, 2])
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    for order, file in ((["x", "y"], classes), (["y", "x"], tmp_path / "others.parquet")):
        kinds["label"] = datasets.ClassLabel(names=order)
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, kinds).to_parquet(str(file))
    assert mixed(classes, tmp_path / "others.parquet", classes) == (["x", "y"], [0, 1, 1, 0])
    y = csv(tmp_path / "y.csv", ["y", "x", "y"])  # by name; else they would be two classes more
    said = jsonl(tmp_path / "y.jsonl", ["y"])
    assert mixed(classes, y, said) == (["x", "y"], [0, 1, 1, 0, 1])
    assert mixed(y, classes, said) == (["x", "y"], [1, 0, 1, 0, 1])
    assert mixed(classes, csv(tmp_path / "at.csv", ["1", "0"])) == (["0", "1"], [0, 1])
    with pytest.raises(AFLoRAError, match=r"z.csv, line 2: its label is z, which is none of x, y\."):
        mixed(classes, csv(tmp_path / "z.csv", ["z"]))
    (quoted := tmp_path / "quoted.jsonl").write_text('{"text": "a film", "label": "0.5"}\n')
    for wrong in ((halves, quoted, halves), (texts, whole, texts)):
        with pytest.raises(AFLoRAError, match=r"holds labels of different kinds: .* in .*, .* in "):
            mixed(*wrong)
    with pytest.raises(AFLoRAError, match=r"names.csv, line 2, column 'label': the label 'b' is no finite number"):
        mixed(cells, names, numbers, cells)


@pytest.mark.parametrize("labels", [["0.0", "1.0", "2.0"], ["1", "0.", "2"], ["100", "1E+05"]])
def test_whole_numbers_written_as_floats_are_regressed_to_and_a_line_says_so(
    labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = csv(tmp_path / "train.csv", labels)
    assert load(path).labels is None
    assert "all of them whole: if they are classes, say data.regression=false." in capsys.readouterr().out
    assert load(path, regression=True).labels is None
    assert "all of them whole" not in capsys.readouterr().out


@pytest.mark.parametrize("case", SAID)
def test_what_labels_are_can_be_said(case: str, tmp_path: Path) -> None:
    regression, cells, typed, names, numbers = SAID[case]
    train, validation = csv(tmp_path / "train.csv", cells), jsonl(tmp_path / "dev.jsonl", typed)
    data = load(train, validation, regression)
    assert data.labels == names
    assert list(data.train["label"]) == numbers
    if cells[0][0] != "9":
        assert sorted(data.evaluation["validation"]["label"]) == sorted(numbers)


@pytest.mark.parametrize(
    ("regression", "labels", "expected"),
    [
        (True, ["1", "good"], r"line 3, column 'label': the label 'good' is no finite number to regress to"),
        (True, ["1", "1,5"], r"line 3, column 'label': the label '1,5' is no finite number to regress to"),
        (True, ["1", "nan"], r"line 3, column 'label': the label 'nan' is no finite number"),
        (True, ["1", "1e39"], r"line 3, column 'label': the label '1e39' is too large to regress to: its square is"),
        (None, ["0.5", "-2e19"], r"line 3, column 'label': the label '-2e19' is too large to regress to"),
        (False, ["0.0", "NA", "1.0"], r"line 3, column 'label': the label 'NA' is no number, but '0'"),
    ],
)
def test_what_is_said_of_labels_has_to_fit(
    regression: bool | None, labels: list[str], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(AFLoRAError, match=expected):
        load(csv(tmp_path / "train.csv", labels), regression=regression)


def test_what_labels_were_taken_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stars, names = csv(tmp_path / "stars.csv", ["1", "2", "4"]), csv(tmp_path / "names.csv", ["pos", "NA", "neg"])
    scores = tmp_path / "scores.csv"
    scores.write_text("text,label\na,0.5\n ,3\n,1\n")
    for path, said in (
        (stars, "5 classes for 3 examples: 0, 1, 2, 3, 4; it has no example of 0, 3.\n"),
        (names, "3 classes for 3 examples: NA, neg, pos.\n"),
        (
            scores,
            "numbers to regress to, from 0.5 to 3.\n"
            f"{scores}, line 3: it has no text in column 'text', the first of 2 rows.\n",
        ),
    ):
        load(path)
        assert capsys.readouterr().out == f"{path}: column 'label' holds {said}"


def test_an_evaluation_that_says_little_is_told(tmp_path: Path) -> None:
    """Sorted sets are common, and data.max_eval_examples takes the first examples."""
    train = csv(tmp_path / "train.csv", ["pos", "neg"] * 3)
    held = csv(tmp_path / "held.csv", ["neg", "neg", "pos"])
    first = " data.max_eval_examples takes the first ones of a split."
    one = "All 2 examples of the validation split are of one class, neg."
    too = "What is measured with is trained on, too: the numbers say nothing of other texts."
    for validation, options, said in (
        (held, {}, []),
        (held, {"max_eval_examples": 2}, [one + first]),
        (csv(tmp_path / "alike.csv", ["neg"] * 2), {}, [one]),
        (train, {}, [too]),
        (train.parent / "." / "train.csv", {}, [too]),
        (train, {"hold_out": 3}, []),
    ):
        config = DataConfig(task="files", train_file=str(train), validation_file=str(validation), **options)
        assert [*odd_evaluation(config, load_data(config, seed=0))] == said
    named: dict[str, Any] = {"task": "files", "name": "owner/set", "train_split": "train"}
    assert trained_too(DataConfig(**named, validation_split="train[:10%]"))
    assert not trained_too(DataConfig(**{**named, "train_split": "train[10%:]"}, validation_split="train[:10%]"))
    assert not trained_too(DataConfig(**named))


def test_numbers_that_float32_does_not_tell_apart_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(csv(tmp_path / "near.csv", ["1e9", "1000000001", "2"]))
    assert "holds 3 different numbers, of which float32, in which is trained, keeps 2 apart" in capsys.readouterr().out
    load(csv(tmp_path / "far.csv", ["0.1", "0.25", "3"]))
    assert "of which float32" not in capsys.readouterr().out


def test_whose_f1_is_measured_is_said_and_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,ham\nb,spam\nc,ham\n")
    options: dict[str, Any] = {"task": "files", "train_file": str(path), "validation_file": str(path)}
    assert load_data(DataConfig(**options), seed=0).positive == 1
    assert "F1 is that of the class spam (data.positive_label)." in capsys.readouterr().out
    assert load_data(DataConfig(**options, positive_label="ham"), seed=0).positive == 0
    assert "F1 is that of the class ham (data.positive_label)." in capsys.readouterr().out
    with pytest.raises(AFLoRAError, match=r"data\.positive_label=yes is none of the classes ham, spam"):
        load_data(DataConfig(**options, positive_label="yes"), seed=0)
    path.write_text("text,label\na,0.5\nb,1.5\nc,2\n")
    with pytest.raises(AFLoRAError, match="chooses one of two classes, and column 'label' holds numbers"):
        load_data(DataConfig(**options, positive_label="1"), seed=0)
    with pytest.raises(AFLoRAError, match=r"data\.positive_label is for data\.task=files"):
        parse(["--data.task", "cola", "--model.name", "demo", "--data.positive_label", "1"])
    config, _ = parse(["--data.task", "files", "--model.name", "demo", "--data.positive_label", "1"])
    assert config.data.positive_label == "1"
