"""`aflora data`: what a training would be given, in a terminal's colours and in words."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from aflora_dist import AFLoRAError
from aflora_dist.view import examples
from tests.small_lm import make_small_language_model
from tests.tasks import hub_sets

CHAT = [{"role": "user", "content": "how many apples ?"}, {"role": "assistant", "content": "Ada has 3 ."}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def chats(tmp_path: Path) -> list[str]:
    """The command's arguments: 30 chats, one too long and one that says nothing, and a model."""
    rows = [{"messages": CHAT}] * 28
    rows += [{"messages": [{**CHAT[0], "content": "how many " * 60}, CHAT[1]]}, {"messages": CHAT[:1]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = make_small_language_model(tmp_path / "model")
    return [str(tmp_path / "chats.jsonl"), "--model.name", str(model), "--data.max_length", "64"]


def printed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, **terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, markup=False, highlight=False, **terminal)  # type: ignore[arg-type]
    monkeypatch.setattr(examples, "create_console", lambda: console)
    assert examples.main(arguments) == 0
    return out.getvalue()


def test_words_say_what_carries_loss_where_there_is_no_colour(
    chats: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = printed([*chats, "--show", "1", "--train.batch_size", "8"], monkeypatch)
    assert "Example 1: " in said
    assert "Example 2: " not in said
    learned = [line.partition("|")[2].strip() for line in said.splitlines() if line.startswith("  learned |")]
    assert " ".join(learned).split()[:4] == ["Ada", "has", "3", "."]
    given = " ".join(line.partition("|")[2] for line in said.splitlines() if line.startswith("    given |"))
    assert "how many apples ?" in " ".join(given.split())
    assert "An epoch has 3 updates of 8 examples (4 are left out at its end" in said  # 28 of 30 carry loss
    assert any("█" in line and line.endswith(" 28") for line in said.splitlines())
    assert (
        "Of 30 examples of the training split: 1 cut to data.max_length=64 tokens; 2 left out"
        in capsys.readouterr().out
    )


def test_colour_says_so_on_a_terminal(chats: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    said = printed(chats, monkeypatch, force_terminal=True)
    assert "\x1b[1;32m" in said
    assert "learned |" not in said
    monkeypatch.setenv("NO_COLOR", "1")
    said = printed(chats, monkeypatch, force_terminal=True)
    assert "learned |" in said
    assert "28 examples are fewer than one batch of train.batch_size=64" in said


def test_a_classifier_s_labels_are_counted_in_every_split(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(hub_sets.ag_news(tmp_path / "news"))
    arguments = [folder, "--model.name", str(tiny_model), "--train.batch_size", "4"]  # and no task: labels say which
    said = printed(arguments, monkeypatch)
    assert "label 'World'" in said
    (line,) = (line for line in said.splitlines() if "Sci/Tech" in line)
    assert "5 (25%)" in line
    assert "2 (25%)" in line
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(AFLoRAError, match=r"notes\.docx: unknown kind of file"):
        examples.main([str(tmp_path / "notes.docx")])


def test_a_data_set_without_a_split_to_measure_with_is_shown_all_the_same(
    chats: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub_sets.sharegpt(tmp_path / "chats")
    said = printed([str(folder), *chats[1:], "--data.train_split", "train[:4]"], monkeypatch)
    assert "4 examples are there to measure with." in said


def test_columns_of_which_none_is_known_are_listed(tmp_path: Path) -> None:
    (tmp_path / "dolly.jsonl").write_text(json.dumps({"instruction": "a", "context": "b", "response": "c"}))
    with pytest.raises(AFLoRAError, match=r"columns instruction, context, response\. .*text_columns.*--data.columns"):
        examples.main([str(tmp_path / "dolly.jsonl")])
