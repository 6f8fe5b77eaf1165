"""What a reviewer finds in TensorBoard, looked up in a real server and a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aflora_dist.tasks.base import Evaluation
from aflora_dist.tasks.sft import LanguageModelling
from tests.browser import CHROMEDRIVER, CHROMIUM, Browser
from tests.launch import ROOT, launch
from tests.runs import options, start
from tests.small_lm import make_small_language_model, write_problems
from tests.tensorboard import PROFILER, TensorBoard

RANGES = ["forward", "backward", "optimizer"] + [f"aflora.{n}" for n in ("observe", "decide", "all_reduce", "rebuild")]


@pytest.fixture(scope="module")
def board(profiled: Path) -> Iterator[TensorBoard]:
    with TensorBoard(profiled / "tensorboard") as running:
        yield running


@pytest.mark.distributed
def test_the_profiler_plugin_reads_both_ranks_all_ranges_and_data_loading(board: TensorBoard) -> None:
    runs = board.wait_for_profiles(3)
    assert runs == ["profile/1_before", "profile/2_middle", "profile/3_after"]
    workers = board.get(f"{PROFILER}/workers", run=runs[1], view="Overview")
    assert [worker.rsplit("_", 1)[1] for worker in workers] == ["0", "1"]
    for worker in workers:
        which = {"run": runs[1], "worker": worker, "span": "1"}
        table = board.get(f"{PROFILER}/operation/table", **which, group_by="Operation")
        times = {row["name"]: row["host_total_duration"] for row in table["data"]}
        assert all(times[name] > 0 for name in RANGES)
        overview = board.get(f"{PROFILER}/overview", **which)
        assert len(overview["steps"]["rows"]) == 3
        shares = {child["name"]: child["value"] for child in overview["performance"][0]["children"]}
        assert shares["DataLoader"] > 0


@pytest.mark.distributed
def test_the_windows_of_a_profiled_run_are_compared_in_a_picture_and_in_tables(profiled: Path) -> None:
    """What shows offline and without the profiler's plugin."""
    events = EventAccumulator(str(profiled / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    (image,) = events.Images("profile/windows")
    assert (image.step, image.width > 800, image.encoded_image_string[:4]) == (23, True, b"\x89PNG")
    (text,) = events.Tensors("profile/tables/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert "||before|middle|after|middle/before|after/before|" in said
    for part in (*RANGES[:3], "aflora.observe", "aflora.decide", "exposed communication", "idle"):
        assert any(line.strip("|\u00a0").startswith(part) for line in said.splitlines()), part
    assert len([line for line in said.splitlines() if line.startswith(("|before|0|", "|before|1|"))]) == 2


@pytest.mark.distributed
def test_a_browser_finds_scalars_fig5_summary_and_hparams(board: TensorBoard) -> None:
    for program in (CHROMIUM, CHROMEDRIVER):
        if program is None:
            pytest.skip("needs Chromium and ChromeDriver (Debian: chromium, chromium-driver)")
    with Browser() as page:
        page.open(board.url + "#scalars&tagFilter=loss|frozen|state_bytes|step_seconds")
        page.wait_for("train/loss", "train/frozen", "train/optimizer_state_bytes", "train/step_seconds")
        page.open(board.url + "#scalars&tagFilter=layer%2001")
        page.wait_for("score layer 01/intermediate.dense A")
        page.open(board.url + "#images")
        content = page.wait_for("freezing/Fig. 5", "profile/windows", images=2)
        assert all(image["width"] > 400 for image in content["images"])
        page.open(board.url + "#text")
        page.wait_for("freezable matrices", "2 x zero2", "initial_epochs: 1.0", "Ranges on the host, ms per step")
        page.open(board.url + "#hparams")
        page.wait_for("learning rate", "result/metric", "2 x zero2")


@pytest.mark.distributed
def test_scalars_and_hparams_say_what_the_run_directory_says(board: TensorBoard, profiled: Path) -> None:
    metrics = [json.loads(line) for line in (profiled / "metrics.jsonl").read_text().splitlines()]
    series = board.get("plugin/scalars/scalars", run=".", tag="train/loss")
    assert [(step, pytest.approx(value)) for _, step, value in series] == [(m["step"], m["loss"]) for m in metrics]
    result = json.loads((profiled / "result.json").read_text())
    columns = ["result/metric", "result/train_seconds", "result/avg_trainable_params"]
    groups = board.get(
        "plugin/hparams/session_groups",
        {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"],
            "colParams": [{"metric": {"tag": tag, "group": ""}} for tag in columns],
            "startIndex": 0,
            "sliceSize": 10,
        },
    )
    (row,) = groups["sessionGroups"]
    assert row["hparams"]["engine"] == "2 x zero2"
    values = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
    assert values["result/metric"] == pytest.approx(result["metrics"]["accuracy"])
    assert values["result/avg_trainable_params"] == pytest.approx(result["avg_trainable_params"])


@pytest.mark.distributed
def test_a_full_disk_costs_telemetry_and_traces_but_not_the_training(arguments: list[str], tmp_path: Path) -> None:
    """No file may grow beyond 30 kB: less than the events and a trace, more than the run's own files."""
    more = ["--profile", "--profile.steps", "1", "--run.save_every", "0"]
    done = launch("single", 1, str(ROOT / "tests" / "workers" / "full_disk.py"), "30000", "0", *arguments, *more)
    assert done.returncode == 0, done.stderr
    assert "TensorBoard's events could not be written" in done.stderr
    assert "the profiler's trace 1_before could not be written" in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 12
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_whose_evaluation_measures_nothing_ends_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModelling, "evaluate", lambda *_: Evaluation({}, ""))
    model = make_small_language_model(tmp_path / "model")
    write_problems(tmp_path / "train.jsonl", 24, seed=0)
    more = {"data.task": "sft", "data.train_file": tmp_path / "train.jsonl", "train.epochs": 2}
    more |= {"data.validation_file": tmp_path / "train.jsonl", "run.tensorboard": True}
    done = start("single", options(tmp_path / "run", model, tmp_path, **more))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"] == {}
