"""`aflora show`: a run's story in the terminal, and its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from aflora_dist.training.run import main
from aflora_dist.view.figures import Place, freeze_map, place
from aflora_dist.view.show import Run, sparkline
from aflora_dist.view.show import main as show


def test_show_tells_the_story_and_writes_figures(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    capsys.readouterr()
    folder = tmp_path / "run"
    assert show([str(folder), "--figures", str(tmp_path / "figures"), "--format", "svg"]) == 0
    said = capsys.readouterr().out
    run = Run(folder)
    assert "8 of 8 projection matrices frozen" in said
    row = next(line for line in said.splitlines() if "intermediate.dense A" in line)
    stem = "base_model.model.bert.encoder.layer.{}.intermediate.dense.aflora.default.A"
    assert [int(word) for word in row.split() if word.isdigit()] == [run.frozen[stem.format(i)] for i in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["curves.svg", "freeze_map.svg", "scores.svg"]
    (axis, _) = freeze_map(run.names, run.frozen, run.total_steps).axes
    assert sorted(int(text.get_text()) for text in axis.texts) == sorted(run.frozen.values())
    # while the run goes on: no result, half of the events
    (folder / "result.json").unlink()
    events = (folder / "freeze_log.jsonl").read_text().splitlines(keepends=True)
    (folder / "freeze_log.jsonl").write_text("".join(events[:2]))
    assert show([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "after 12 of 12 steps" in said
    assert "trains" in said


def test_show_refuses_what_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show([str(tmp_path)]) == 2
    assert "is not a run's directory" in capsys.readouterr().err


def test_names_are_taken_apart_into_layer_and_kind() -> None:
    llama = "base_model.model.model.layers.11.mlp.up_proj.aflora.default.B"
    assert place(llama) == Place("model.layers", 11, "mlp.up_proj B")
    assert place("base_model.model.up.aflora.other.A") == Place("", -1, "up A")


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, None, 0.5]) == "▁█▅"
    assert len(sparkline(list(range(1000)))) <= 60
