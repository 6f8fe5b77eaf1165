"""What a run writes is JSON for strict readers, whatever came out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from aflora_dist.options import RunConfig
from aflora_dist.store.records import dumps
from aflora_dist.store.rundir import RunDirectory
from aflora_dist.tasks.base import Evaluation
from aflora_dist.tasks.classification import Classification
from aflora_dist.training.run import main


def strictly(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null() -> None:
    record = {"a": [math.nan, {"b": (math.inf, 1.5)}], "c": -math.inf, "d": True, "e": None, "f": 3}
    assert strictly(dumps(record)) == {"a": [None, {"b": [None, 1.5]}], "c": None, "d": True, "e": None, "f": 3}


def test_all_that_a_run_directory_is_given_is_written_strictly(tmp_path: Path) -> None:
    run = RunDirectory(RunConfig(dir=str(tmp_path / "run")), Accelerator(cpu=True))
    run.claim("a: 1\n", going_on=None)
    for name in ("metrics.jsonl", "freeze_log.jsonl"):
        run.append(name, {"step": 0, "loss": math.nan})
        assert strictly((run.path / name).read_text()) == {"step": 0, "loss": None}
    run.finish({"metrics": {"pearson": math.nan}})
    assert strictly((run.path / "result.json").read_text()) == {"metrics": {"pearson": None}}


def test_a_metric_that_is_not_a_number_ends_the_main_job_well(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Classification, "evaluate", lambda *_: Evaluation({"pearson": math.nan, "loss": 0.5}))
    assert main(arguments) == 0
    assert "not a number" in capsys.readouterr().out
    result = strictly((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"] == {"pearson": None, "loss": 0.5}
    (tmp_path / "run" / "result.json").write_text(json.dumps(result)[:-9])
    assert main([*arguments, "--resume"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aflora: ")]
    assert "result.json is cut or damaged" in line
    (tmp_path / "run" / "result.json").unlink()
    assert main([*arguments, "--resume"]) == 0
