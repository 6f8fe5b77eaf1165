"""Traces: which updates are recorded, what a file says, and that the profiler plugin reads it right."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch_tb_profiler.profiler.data import RunProfileData
from torch_tb_profiler.profiler.run_generator import RunGenerator

from aflora_dist import AFLoRAError
from aflora_dist.freezing import CubicSchedule, FreezingConfig, FreezingPolicy, Moments
from aflora_dist.watch.memory import MemoryHistory
from aflora_dist.watch.traces import TraceRecorder, Window, for_plugin, windows

from .cuda_trace import cuda_trace

STEPS = {"total_steps": 100, "initial_steps": 10, "final_steps": 50}
SCHEDULE = CubicSchedule(**STEPS)
MOMENTS = FreezingConfig(**STEPS).moments(24)


def test_windows_lie_before_around_the_middle_of_and_after_the_freezing() -> None:
    before, middle, after = windows(MOMENTS, steps=4)
    counts = [SCHEDULE.count(t, 24) for t in range(100)]
    assert counts[before.start + 3] == 0
    recorded = range(middle.start, middle.start + 4)
    assert counts[recorded[0] - 1] < 12 <= counts[recorded[-1]]
    assert counts[after.start - 1] == 24
    assert [w.name for w in (before, middle, after)] == ["1_before", "2_middle", "3_after"]
    assert [w.freezes for w in (before, middle, after)] == [False, True, False]


@pytest.mark.parametrize(
    ("t_i", "t_f", "expected"),
    [
        (3, 2, [("1_before", 4), ("2_middle", 4), ("3_after", 1)]),
        (0, 0, [("1_before", 1), ("2_middle", 4), ("3_after", 4)]),
        (0, 1, [("1_before", 1), ("2_middle", 4)]),
        (10, 4, [("1_before", 4), ("2_middle", 4), ("3_after", 3)]),
    ],
)
def test_what_is_called_before_and_after_holds_no_freeze(t_i: int, t_f: int, expected: list[tuple[str, int]]) -> None:
    found = windows(FreezingConfig(total_steps=100, initial_steps=t_i, final_steps=t_f).moments(24), steps=4)
    assert [(window.name, window.steps) for window in found] == expected
    assert [window.freezes for window in found] == [window.name == "2_middle" for window in found]


@pytest.mark.parametrize("total", [3, 5, 16, 100])
def test_windows_that_are_not_asked_for_fit_into_any_training(total: int) -> None:
    for t_i, t_f, steps, matrices in itertools.product(range(0, total, 3), range(0, total, 3), (1, 2, 5, 60), (1, 24)):
        if t_i + t_f < total and steps < total:
            config = FreezingConfig(total_steps=total, initial_steps=t_i, final_steps=t_f)
            found = windows(config.moments(matrices), steps)
            assert not any(window.freezes for window in found if window.name != "2_middle")
            assert {window.steps for window in found} <= {*range(1, steps + 1)}


@pytest.mark.parametrize("units", [2, 3, 7])
@pytest.mark.parametrize("every", [1, 10])
def test_around_the_middle_something_freezes_whatever_freezes_together(units: int, every: int) -> None:
    """Layers or blocks, which are fewer than their matrices, and freeze at other updates."""
    config = FreezingConfig(total_steps=100, initial_steps=10, final_steps=30, every=every)
    names = [f"layers.{i}.{m}.weight" for i in range(units) for m in "abcd"]
    policy, frozen, at = FreezingPolicy(names, unit="block"), 0, []
    assert len(policy) == units
    for t in range(100):
        if policy.due(config.schedule(), t, units - frozen):
            frozen = config.schedule().count(t, units)
            at.append(t)
    found = windows(config.moments(len(policy)), steps=4)
    for window in found:
        recorded = range(window.start, window.start + window.steps)
        assert window.freezes == any(t in recorded for t in at) == (window.name == "2_middle"), window


@pytest.mark.parametrize("prefix_steps", [0, 5, None])
@pytest.mark.parametrize("rule", ["rank", "quantile", "threshold"])
def test_windows_beside_the_freezing_know_of_whole_blocks_and_of_rules_by_which_scores_decide(
    rule: Any, prefix_steps: int | None
) -> None:
    config = FreezingConfig(
        total_steps=100, initial_steps=10, final_steps=30, prefix=True, prefix_steps=prefix_steps, rule=rule
    )
    moments = config.moments(24, blocks=6)
    assert isinstance(moments, Moments)
    whole, last = config.prefix_schedule(), 71 if rule == "quantile" else 70
    grows = {t for t in range(1, 100) if whole.count(t, 6) > whole.count(t - 1, 6)}
    assert max(grows) == {0: 51, 5: 95, None: 85}[prefix_steps]
    assert grows <= {*moments.freezes}
    windows_of = {window.name: window for window in windows(moments, steps=4)}
    after = windows_of.get("3_after")
    assert (after is None) == (rule == "threshold")
    assert after is None or after.start > max(last, *grows)
    assert windows_of["1_before"].start + windows_of["1_before"].steps <= (10 if rule != "rank" else 12)
    assert windows_of["2_middle"].freezes


def test_windows_where_nothing_freezes_or_where_asked_for() -> None:
    assert windows(FreezingConfig(**STEPS).moments(0), 4) == (Window("training", 1, 4),)
    assert windows(MOMENTS, 2, starts=[30, 7]) == (Window("1_from_7", 7, 2), Window("2_from_30", 30, 2, freezes=True))


@pytest.mark.parametrize(("steps", "starts"), [(4, [0]), (4, [98]), (4, [10, 14]), (4, [-3])])
def test_windows_that_do_not_fit_are_refused(steps: int, starts: list[int] | None) -> None:
    with pytest.raises(AFLoRAError, match=r"Profiling does not fit: .* of 100\."):
        windows(MOMENTS, steps, starts)


def plugin_reads(trace: dict[str, Any]) -> Any:
    logging.disable(logging.ERROR)  # the plugin reports what it does not know
    try:
        data = RunProfileData.from_json("worker", None, trace)
        return RunGenerator("worker", None, data).generate_run_profile()
    finally:
        logging.disable(logging.NOTSET)


def test_device_times_survive_the_export() -> None:
    profile = plugin_reads(for_plugin(cuda_trace()))
    rows = {row["name"]: row for row in profile.operation_table_by_name["data"]}
    times = {n: (rows[n]["host_total_duration"], rows[n]["device_total_duration"]) for n in ("forward", "aten::mul")}
    assert times == {"forward": (400, 300), "aten::mul": (120, 240)}  # microseconds over two steps
    assert rows["aten::addmm"]["device_total_duration"] == 300
    assert rows["aflora.all_reduce"]["host_total_duration"] == 180
    shares = {child["name"]: child["value"] for child in profile.overview["performance"][0]["children"]}
    assert shares["DataLoader"] == 80  # of a step, on average
    assert shares["Kernel"] > 0


def test_without_the_export_the_plugin_reads_such_a_trace_wrongly() -> None:
    """Should this fail one day, the plugin has followed torch and the export can go."""
    profile = plugin_reads(cuda_trace())
    rows = {row["name"]: row for row in profile.operation_table_by_name["data"]}
    assert "forward" not in rows
    assert rows["aten::mul"].get("device_total_duration", 0) == 0


def test_the_export_changes_categories_and_nothing_else() -> None:
    original, written = cuda_trace(), for_plugin(cuda_trace())
    without = [
        [{k: v for k, v in event.items() if k != "cat"} for event in t["traceEvents"]] for t in (original, written)
    ]
    assert without[0] == without[1]
    assert {k: v for k, v in original.items() if k != "traceEvents"} == {
        k: v for k, v in written.items() if k != "traceEvents"
    }
    assert list(written)[-1] == "traceEvents"


def ranges(file: Path) -> dict[str, list[tuple[float, float, int]]]:
    """name -> (start, end, thread) of each range in a trace."""
    found = defaultdict(list)
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        if event.get("ph") == "X":
            found[event["name"]].append((event["ts"], event["ts"] + event["dur"], event["tid"]))
    return found


@pytest.mark.distributed
def test_a_trace_holds_all_ranges_on_both_ranks_rightly_nested(profiled: Path) -> None:
    def inside(inner: str, outer: str) -> bool:
        return all(any(o[0] <= i[0] and i[1] <= o[1] and i[2] == o[2] for o in found[outer]) for i in found[inner])

    for window in ("1_before", "2_middle", "3_after"):
        files = sorted((profiled / "tensorboard" / "profile" / window).iterdir())
        assert [file.name.split(".")[0][-2:] for file in files] == ["_0", "_1"]
        for file in files:
            found = ranges(file)
            steps = [name for name in found if name.startswith("ProfilerStep#")]
            assert len(steps) == 3
            assert len(found["backward"]) == len(found["optimizer"]) == 3
            assert len(found["forward"]) >= 3  # an evaluation may lie in a window
            assert not any(b[0] < o[0] < b[1] for b in found["backward"] for o in found["optimizer"])
            freezes = window == "2_middle"
            assert bool(found["aflora.decide"]) == bool(found["aflora.rebuild"]) == freezes
            assert bool(found["aflora.observe"]) == (window != "3_after")
            assert inside("aflora.observe", "optimizer")
            # Telemetry asks for scores as well; every decision holds one exchange.
            decisions = found["aflora.decide"]
            within = [a for a in found["aflora.all_reduce"] if any(d[0] <= a[0] <= d[1] for d in decisions)]
            assert len(within) == len(decisions)
            assert inside("aflora.decide", "optimizer")
            assert inside("aflora.rebuild", "optimizer")
    assert not list(profiled.glob(".trace*"))
    result = json.loads((profiled / "result.json").read_text())
    assert result["traces"] == [f"tensorboard/profile/{w}" for w in ("1_before", "2_middle", "3_after")]


def test_profiling_leaves_no_trace_in_what_it_watched(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = [dict(vars(owner)) for owner in (model, accelerator, optimizer)]
    recorder = TraceRecorder(
        [Window("one", 1, 2)], 0, tmp_path / "tensorboard", accelerator, model, optimizer, ranks=None, memory=True
    )
    for step in range(5):
        accelerator.backward(model(torch.randn(4, 3)).sum())
        optimizer.step()
        recorder.advance(step)
    recorder.close()
    assert recorder.written == [tmp_path / "tensorboard" / "profile" / "one"]
    assert [set(vars(owner)) for owner in (model, accelerator, optimizer)] == [set(b) for b in before]
    (file,) = recorder.written[0].iterdir()
    assert len(ranges(file)["forward"]) == 2
    assert "[memory]" in gzip.decompress(file.read_bytes()).decode()


class Memory:
    """In the place of torch's recorder of CUDA memory: keeps how it was called, writes a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", self.dump)

    def record(
        self, enabled: str | None = "all", context: str = "all", stacks: str = "all", max_entries: int = 1 << 63
    ) -> None:
        self.calls.append((enabled, max_entries))

    def dump(self, filename: str) -> None:
        self.calls.append("dump")
        Path(filename).write_text("a snapshot")


def test_memory_is_recorded_around_the_freeze_and_lies_beside_the_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch)
    history = MemoryHistory()
    rehearsed, memory.calls = memory.calls, []
    assert [enabled for enabled, _ in rehearsed] == ["all", None]
    accelerator = Accelerator(cpu=True)
    recorded = [Window("1_before", 1, 2), Window("2_middle", 5, 2, freezes=True)]
    recorder = TraceRecorder(
        recorded, 0, tmp_path / "tensorboard", accelerator, nn.Linear(1, 1), None, None, True, history
    )
    seen = []
    for step in range(8):
        recorder.advance(step)
        seen.append(list(memory.calls))
    recorder.close()
    # From the update before the window, which warms up, to the window's last.
    assert [len(calls) for calls in seen] == [0, 0, 0, 1, 1, 1, 3, 3]
    assert memory.calls[0][1] <= 100_000  # without a bound it would take all memory
    assert memory.calls[1:] == ["dump", (None, memory.calls[2][1])]
    (file,) = (tmp_path / "tensorboard").rglob("*.memory.pickle")
    assert file.parent.name == "2_middle"
    assert file.name.endswith("_0.memory.pickle")
    assert file.read_text() == "a snapshot"


def test_a_recording_that_does_not_come_to_its_end_leaves_no_recorder_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch)
    recorder = TraceRecorder(
        [Window("one", 1, 3, freezes=True)],
        0,
        tmp_path / "tensorboard",
        Accelerator(cpu=True),
        nn.Linear(1, 1),
        None,
        None,
        True,
        MemoryHistory(),
    )
    recorder.advance(0)
    recorder.close()
    assert memory.calls[-1][0] is None
    assert "dump" not in memory.calls


def test_a_snapshot_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    memory = Memory(monkeypatch)

    def full(filename: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    window = Window("one", 1, 1, freezes=True)
    recorder = TraceRecorder(
        [window], 0, tmp_path / "tensorboard", Accelerator(cpu=True), nn.Linear(1, 1), None, None, True, MemoryHistory()
    )
    for step in range(3):
        recorder.advance(step)
    said = capfd.readouterr().err
    assert "the profiler's trace one could not be written" in said
    assert "No space left on device" in said
    assert memory.calls[-1][0] is None


def test_a_torch_without_the_memory_recorder_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(monkeypatch)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled=None: None)
    with pytest.raises(AFLoRAError, match=r"Recording CUDA memory failed when it was rehearsed.*torch 2"):
        MemoryHistory()
    monkeypatch.delattr(torch.cuda.memory, "_record_memory_history")
    with pytest.raises(AFLoRAError, match=r"has no torch\.cuda\.memory\._record_memory_history.*install that release"):
        MemoryHistory()


def test_a_trace_that_cannot_be_written_costs_the_trace_and_not_the_training(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from aflora_dist.training.run import main

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".trace_1_before").write_text("in the way")
    assert main([*arguments, "--profile", "--profile.steps", "1"]) == 0
    said = capfd.readouterr().err
    assert "the profiler's trace 1_before could not be written" in said
    assert said.count("aflora: warning") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["traces"] == []
    assert result["steps"] == 12


def test_profile_options_that_do_not_fit_are_refused_before_training(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from aflora_dist.training.run import main

    for wrong, complaint in (
        (["--profile.steps", "30"], "Profiling does not fit"),
        (["--profile.ranks", "[1]"], "profile.ranks names rank 1; there are 1"),
        (["--profile.steps", "0"], "profile.steps must be at least 1"),
    ):
        assert main([*arguments, "--profile", *wrong]) == 2
        assert complaint in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
