"""Experiment trackers: real ones, offline, say what metrics.jsonl says; one that fails costs nothing but itself."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState, tracking
from accelerate.tracking import GeneralTracker

from aflora_dist.errors import AFLoRAError
from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main
from aflora_dist.watch.trackers import Tracker
from tests.launch import MAIN_JOB, launch
from tests.runs import lines, options

REAL = ["wandb", "mlflow", "trackio"]
NAMES = ["train/loss", "train/tokens_per_second", "train/trainable_params", "eval/accuracy", "result/metric"]
SCORE = "score layer 01/intermediate.dense A"
Series = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def run(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with all trackers that stopped after 12 of 24 updates, as a kill would have it, and was resumed."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    chosen = options(folder, tiny_model, reviews, **{"run.save_every": 6})
    at = chosen.index("--run.tensorboard")
    chosen[at : at + 2] = ["--run.trackers", json.dumps(["tensorboard", *REAL])]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "TRACKIO_DIR": str(folder.parent / "trackio"),
            "HF_HUB_OFFLINE": "1",
        }.items():
            patch.setenv(name, value)
        for name in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        for name in REAL:
            pytest.importorskip(name, reason=f"{name} comes with the extra `trackers`")
        for name, module in list(sys.modules.items()):  # trackio has looked for its folder when it was imported
            if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
                patch.setattr(module, "TRACKIO_DIR", folder.parent / "trackio")
        assert main(chosen) == 0
        assert main([*chosen, "--resume", str(folder / "checkpoints" / "step_00000012")]) == 0
        yield folder


def from_wandb(run: Path) -> Series:
    """Of all of the run's offline parts, which `wandb sync` would send to one run by its id."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Series = defaultdict(dict)
    parts = sorted((run / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    assert len({part.name for part in parts}) == 1
    assert len(list((run / "trackers" / "wandb").glob("offline-run-*/files/media/images/**/*.png"))) >= 4
    for part in parts:
        for content in leveldb_records(part.read_bytes()[7:]):
            record = Record()
            record.ParseFromString(content)
            for item in record.history.item:
                value = json.loads(item.value_json)
                if isinstance(value, int | float):
                    name = item.key or "/".join(item.nested_key)
                    found[name][record.history.step.num] = value
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB (the first one 7 bytes in), records whole or in parts."""
    at, whole = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + 7) % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def from_mlflow(run: Path) -> Series:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run / "trackers" / "mlflow").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'aflora'")
    (known,) = client.search_runs([experiment.experiment_id])
    assert known.info.status == "FINISHED"
    assert known.data.params["train.epochs"] == "4"
    assert known.data.params["engine"] == "1 x single"
    figures = [file.path for file in client.list_artifacts(known.info.run_id, "freezing/Fig. 5")]
    assert figures == [f"freezing/Fig. 5/step_{step:08d}.png" for step in (5, 11, 17, 23)]
    found: Series = {}
    for name in known.data.metrics:
        found[name] = {m.step: m.value for m in client.get_metric_history(known.info.run_id, name)}
    return found


def from_trackio(run: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((run / "trackers" / "ids.json").read_text())["trackio"]
    assert name in SQLiteStorage.get_runs("aflora")
    found: Series = defaultdict(dict)
    for log in SQLiteStorage.get_logs("aflora", name):
        for key, value in log.items():
            if "/" in key and isinstance(value, int | float):
                found[key][log["step"]] = value
    return found


READERS = {"wandb": from_wandb, "mlflow": from_mlflow, "trackio": from_trackio}


@pytest.mark.parametrize("name", REAL)
def test_a_tracker_has_one_run_with_all_that_the_run_directory_has(name: str, run: Path) -> None:
    found = READERS[name](run)
    metrics = lines(run, "metrics.jsonl")
    for key in ("loss", "tokens_per_second", "trainable_params"):
        assert found[f"train/{key}"] == {m["step"]: pytest.approx(m[key]) for m in metrics}, key
    result = json.loads((run / "result.json").read_text())
    accuracy = [evaluation["accuracy"] for evaluation in result["evaluations"]]
    assert found["eval/accuracy"] == dict(zip((5, 11, 17, 23), map(pytest.approx, accuracy), strict=True))
    assert found["result/metric"][23] == pytest.approx(accuracy[-1])
    assert SCORE in found


def test_all_have_the_same_names(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    names = set(board.Tags()["scalars"])
    assert {*NAMES, SCORE} <= names
    for read in READERS.values():
        assert {name for name in read(run) if not name.startswith("system/")} >= names


def test_an_earlier_releases_option_still_works() -> None:
    assert parse([])[0].run.trackers == ["tensorboard"]
    assert parse(["--run.tensorboard", "false"])[0].run.trackers == []
    config, resolved = parse(["--run.tensorboard", "true", "--run.trackers", "[wandb]"])
    assert config.run.trackers == ["tensorboard", "wandb"]
    assert config.run.tensorboard is None
    assert "tensorboard: null" in resolved


def test_what_is_not_installed_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aim").mkdir()  # the folder that Aim makes is not Aim
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AFLoRAError, match=r"aim, which is not installed\. Install it \(pip install aim\)"):
        parse(["--run.trackers", "[aim]"])
    with pytest.raises(AFLoRAError, match=r"names 'wand'\. Trackers: tensorboard, wandb, "):
        parse(["--run.trackers", "[wand]"])


class Scripted(GeneralTracker):
    """A tracker in place of trackio's."""

    name = "trackio"
    requires_logging_directory = False
    main_process_only = False
    tracker = property(lambda self: self)

    def __init__(self, project: str, **options: Any) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append(values)


class Failing(Scripted):
    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        super().log(values)
        if len(self.logged) == 3:
            raise ConnectionError("the server is\ngone")
        assert len(self.logged) < 3


def test_a_tracker_that_fails_is_said_once_and_costs_nothing_else(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Failing)
    assert main([*arguments, "--run.trackers", "[trackio]"]) == 0
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if "tracker" in line] == [
        "aflora: warning: the tracker trackio has failed (the server is gone); training goes on without it."
    ]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12


def test_a_server_that_does_not_answer_is_given_up_by_the_trackers_own_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow"):
        pytest.importorskip(name, reason=f"{name} comes with the extra `trackers`")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_HTTP_REQUEST_TIMEOUT": "7"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_FINISH_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")  # to be taken back afterwards
        del os.environ[name]
    PartialState(cpu=True)
    tracker = Tracker("wandb", tmp_path, {})
    try:
        assert tracker._tracker.tracker.settings.finish_timeout == 60
    finally:
        tracker.close()
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 2
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 7, "what is set stays"


@pytest.mark.distributed
def test_a_tracker_that_does_not_start_ends_all_ranks_with_the_reason(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    done = launch("ddp", 2, *MAIN_JOB, *arguments, "--run.trackers", "[mlflow]", timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("aflora: error: The tracker mlflow did not start: ") == 1
    assert "Traceback" not in done.stderr
    assert os.environ["MLFLOW_TRACKING_URI"] == "nonsense://nowhere"
