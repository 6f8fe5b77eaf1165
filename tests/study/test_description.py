"""What a study's file may say, and what of it is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.study.description import read_study
from aflora_dist.study.grid import Grid
from tests.study.written import write_study

START = "tasks: {reviews: {preset: demo}}\nseeds: [0]\n"
SWEEP = {"seeds": [100], "options": {"data.hold_out": 16}}


def written(folder: Path, text: str, name: str = "mine") -> Path:
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def test_a_date_is_a_text(tmp_path: Path) -> None:
    said = "title: 2024-13-45\nmethods: {a: {adapter.r: 2024-01-01}}\n"
    study = read_study(written(tmp_path, START + said))
    assert study.title == "2024-13-45"
    with pytest.raises(AFLoRAError, match=r"a on reviews: adapter\.r must be a whole number, not 2024-01-01"):
        Grid(study)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("methods:\n  a: {adapter.r: 2}\n  a: {adapter.r: 4}\n", "mine.yaml, line 5: .* methods.a stands there"),
        ("methods:\n  1: {adapter.r: 2}\n  '1': {adapter.r: 4}\n", "line 5: .* methods.1 stands there already"),
        ("methods: {a: {adapter.r: 2, adapter.r: 4}}\n", "line 3: .* methods.a.adapter.r stands there already"),
        ("methods: {a: {}}\nseeds: [1]\n", "line 4: .* seeds stands there already"),
        ("methods: {a: {train.learning_rate: 1:30.5}}\n", "line 3: .* to YAML, 1:30.5 is no decimal number"),
        ("methods: {a: {adapter.r: !!binary aGk=}}\n", "line 3: .* could not determine a constructor"),
        ("methods: {a: {adapter.r: !!int many}}\n", "mine.yaml: this is not YAML that describes a study: invalid"),
        ("methods: {a: {}\n", "this is not YAML that describes a study"),
        ("methods: {a: {}, b: {}}\ncompare: [[a, b], [b, a]]\n", "compare names b and a twice"),
        ("methods: {a: {}, b: {}}\ncompare: [[a, b], [a, b]]\n", "compare names a and b twice"),
        ("methods: {a: {}}\ncompare: [[a, a]]\n", r"pairs of methods, .*; \['a', 'a'\] is none"),
    ],
)
def test_what_a_file_cannot_say_is_told_with_its_place(said: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(AFLoRAError, match=expected):
        read_study(written(tmp_path, START + said))


def test_what_is_merged_into_a_mapping_is_not_named_twice(tmp_path: Path) -> None:
    said = "methods:\n  a: &a {adapter.r: 2, freezing.score: random}\n  b: {<<: *a, adapter.r: 4}\n"
    methods = read_study(written(tmp_path, START + said)).methods
    assert methods["b"].options == {"adapter.r": 4, "freezing.score": "random"}


def test_what_is_like_another_may_lie_in_another_folder_and_is_told_what_is_missing(tmp_path: Path) -> None:
    written(tmp_path, f"{START}methods: {{a: {{}}}}\nsmall: 3\n", "common")
    (tmp_path / "inner").mkdir()
    with pytest.raises(AFLoRAError, match=r"common\.yaml: small must hold names with values, not 3"):
        read_study(written(tmp_path / "inner", "like: ../common\n"))
    with pytest.raises(AFLoRAError, match=r"gone\.yaml, which is to describe a study, could not be read"):
        read_study(written(tmp_path, "like: gone\n"))
    written(tmp_path, f"{START}methods: {{a: {{}}}}\n", "common")
    assert [*read_study(written(tmp_path / "inner", "like: ../common\n")).methods] == ["a"]
    small = written(tmp_path, f"{START}methods: {{a: {{}}}}\nsmall: {{methods: [a]}}\n")
    with pytest.raises(AFLoRAError, match=r"small\.methods must hold names with values"):
        read_study(small, small=True)
    with pytest.raises(AFLoRAError, match="no section `small`"):
        read_study(written(tmp_path, f"{START}methods: {{a: {{}}}}\n"), small=True)


def test_seeds_of_a_command_line_are_held_to_what_those_of_a_file_are(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, methods={"a": {}}, sweep=SWEEP))
    with pytest.raises(AFLoRAError, match="mine: seed 100 is the sweep's and is reported, too"):
        study.restricted([], [], [7, 100])
    with pytest.raises(AFLoRAError, match="--seeds must list whole numbers from 0 on"):
        study.restricted([], [], [-1])
    assert study.restricted([], [], [0, 0, 3]).seeds == [0, 3]
