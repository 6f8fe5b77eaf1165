"""`aflora show`: a run's story in the terminal, and its figures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from aflora_dist.figures import freeze_map
from aflora_dist.names import MatrixPosition, matrix_position
from aflora_dist.training.run import main
from aflora_dist.view.show import Run, sparkline
from tests.runs import command
from tests.view.written import NAME, write_lines, write_run

show = command("show")


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
    assert "after 12 of 12 steps" in " ".join(said.split())  # the model's path before it may have filled the line
    assert "trains" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "There is no folder"),
        (lambda path: path.touch(), "is not a folder"),
        (lambda path: path.mkdir(), "is not a run's directory: it has no config.yaml"),
        (lambda path: _foreign(path, "model: {lr: 1}\n"), "is not a run's directory: its config.yaml is another"),
        (lambda path: _foreign(path, "a: !!python/object:x.Y {}\n"), "config.yaml, line 1, column 4: this is not YAML"),
        (lambda path: _foreign(path, "a: 2024-13-45\n"), "config.yaml: this is not YAML that can be read: month must"),
    ],
    ids=["nothing", "a file", "an empty folder", "foreign", "tags", "not YAML"],
)
def test_show_refuses_what_is_not_a_run(
    make: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "it")
    assert show([str(tmp_path / "it")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aflora: error: ")
    assert said in line


def _foreign(path: Path, config: str) -> None:
    path.mkdir()
    (path / "config.yaml").write_text(config)


def test_show_leaves_out_what_is_damaged_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    lines[2], lines[4], lines[11] = b'{"step": 2, "lo', b'{"step": "4"}', lines[11][:30]
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines[:12]))  # the last one is being written
    events = (run / "freeze_log.jsonl").read_bytes()
    (run / "freeze_log.jsonl").write_bytes(events.replace(b'"frozen"', b'"fr\xffzen"', 1))
    (run / "result.json").write_text('{"metrics": {"accuracy": 0.75')
    assert show([str(run)]) == 0
    printed, said = capsys.readouterr()
    assert "after 11 of 12 steps" in printed
    assert "7 of 7 projection matrices frozen in 7 events." in printed
    assert [line.removeprefix(f"aflora: warning: {run}/").split(" (")[0] for line in said.splitlines()] == [
        "metrics.jsonl: line 3 and 1 more cannot be read and is left out.",
        "freeze_log.jsonl: line 1 cannot be read and is left out.",
        "result.json is cut or damaged",
    ]


@pytest.mark.parametrize(("max_steps", "expected"), [(None, "after 9 steps"), (40, "after 9 of 40 steps")])
def test_what_froze_tells_how_far_a_run_is_whose_first_line_of_metrics_is_still_to_come(
    max_steps: int | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "result.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["max_steps"] = max_steps
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    events = (run / "freeze_log.jsonl").read_text().splitlines(keepends=True)
    (run / "freeze_log.jsonl").write_text("".join(events[:6]))  # the last one after step 8, from 0
    assert show([str(run)]) == 0
    assert f"tiny on rte: {expected}\n" in capsys.readouterr().out


def test_show_and_its_figures_do_with_the_fields_that_an_earlier_release_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [{"step": step, "loss": 1.0} for step in range(3)])
    write_lines(run / "freeze_log.jsonl", [{"step": 1, "frozen": [NAME.format(0, "output", "A")]}])
    (run / "result.json").write_text('{"task": "rte", "metrics": {"pearson": NaN}, "evaluations": [{}, {}]}')
    assert show([str(run), "--figures", str(tmp_path / "figures")]) == 0
    printed, said = capsys.readouterr()
    assert "not a number" in printed
    assert said == ""
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["curves.png", "freeze_map.png"]


def test_names_are_no_formulas_in_figures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    log = (run / "freeze_log.jsonl").read_text()
    (run / "freeze_log.jsonl").write_text(log.replace("intermediate", r"$\\frac{1}{$"))
    assert show([str(run), "--figures", str(tmp_path / "figures")]) == 0


def test_names_are_taken_apart_into_layer_and_kind() -> None:
    llama = "base_model.model.model.layers.11.mlp.up_proj.aflora.default.B"
    assert matrix_position(llama) == MatrixPosition("model.layers", 11, "mlp.up_proj B")
    assert matrix_position("base_model.model.up.aflora.other.A") == MatrixPosition("", -1, "up A")


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, None, 0.5]) == "▁█▅"
    assert len(sparkline(list(range(1000)))) <= 60


@pytest.mark.parametrize(
    ("method", "called"), [(None, "AFLoRA"), ("aflora", "AFLoRA"), ("full", "Full fine-tuning"), ("ia3", "ia3")]
)
def test_the_summary_names_the_method_that_trained(
    method: str | None, called: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    if method is not None:
        result |= {"method": method, "freezable_matrices": 8 if method == "aflora" else 0, "freeze_events": 0}
    (run / "result.json").write_text(json.dumps(result))
    assert show([str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{called} on rte" in said
    assert ("projection matrices in" in said) == (called == "AFLoRA")


@pytest.mark.parametrize(("name", "shown"), [("my runs", "'my runs'"), ("-x", "./-x")])
def test_the_command_that_a_summary_names_can_be_copied(
    name: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert show(["--", name]) == 0
    assert f"aflora show {shown} " in capsys.readouterr().out


def test_what_did_not_freeze_is_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    counted = {"freezable_matrices": 8, "frozen_matrices": 5, "freeze_events": 2}
    (run / "result.json").write_text(json.dumps(result | counted))
    assert show([str(run)]) == 0
    assert "5 of 8 projection matrices in 2 events" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_is_no_reason_to_end(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "l\u00e4uft \u2192")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    assert show([str(run)]) == 0
    assert show([str(tmp_path / "\u2192")]) == 2
    for stream in streams:
        stream.flush()
    said, complained = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    assert "projection matrices frozen" in said
    assert "?" in complained


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_curves_fit_the_terminal_to_their_end(
    columns: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    folder = write_run(tmp_path / "run")
    lines = [{"step": step, "loss": 1.0 - step / 200} for step in range(200)]
    write_lines(folder / "metrics.jsonl", lines)
    assert show([str(folder)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    bars = row.split()[1]
    assert (bars[0], bars[-1]) == ("█", "▁")
    assert 10 <= len(bars) <= 60


def test_a_reader_that_has_enough_and_ctrl_c_end_a_command_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", stream)
        assert command("reproduce")([]) == 1  # prints, and not by rich, which knows of pipes

    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aflora_dist.view.show.Run", interrupted)
    assert show(["run"]) == 130
    assert capsys.readouterr().err == "aflora: interrupted.\n"
