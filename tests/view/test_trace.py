"""`aflora trace`: its numbers against other readings of the same events, what it says of bad files."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from aflora_dist.errors import AFLoRAError
from aflora_dist.figures import window_bars
from aflora_dist.traces import RankReport, TraceError, read_run, tables
from aflora_dist.traces.analysis import report_rank, waits
from aflora_dist.traces.intervals import difference, intersection, total, union
from aflora_dist.traces.reader import read_trace
from aflora_dist.watch.traces import for_plugin
from tests.runs import command
from tests.watch.cuda_trace import NCCL, cuda_trace

main = command("trace")

pytestmark = pytest.mark.usefixtures("wide")
Trace = dict[str, Any]
STANDARD = ("1_before", "2_middle", "3_after")


def write(run: Path, window: str, rank: int, trace: Trace, world: int = 2) -> Path:
    """As the main job writes it."""
    file = run / "tensorboard" / "profile" / window / f"a_host.example_{rank}.1.pt.trace.json.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    trace = {"distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world}, **trace}
    file.write_bytes(gzip.compress(json.dumps(for_plugin(trace)).encode(), 1))
    return file


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no table has to be folded."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def cuda_run(tmp_path: Path) -> Path:
    """Three windows on two ranks; the all-reduce takes rank 0 40 us, rank 1, which comes to it first, 100, 70, 40."""
    for window, duration in zip(STANDARD, (100, 70, 40), strict=True):
        write(tmp_path / "run", window, 0, cuda_trace())
        write(tmp_path / "run", window, 1, cuda_trace(collective=(585, duration)))
    return tmp_path / "run"


def spans(report: RankReport) -> dict[str, tuple[float, float | None]]:
    return {" > ".join(t.path): (round(t.host_ms, 6), t.device_ms and round(t.device_ms, 6)) for t in report.ranges}


def times(report: RankReport) -> list[float]:
    names = ("step", "computing", "communication", "exposed", "idle")
    return [round(getattr(report, f"{name}_ms"), 6) for name in names]


# What the events say


@pytest.mark.parametrize("export", [for_plugin, lambda trace: trace], ids=["as_written", "as_torch_writes_it"])
@pytest.mark.parametrize(
    ("collective", "exposed"),
    [
        ((585, 40), 40),  # beside nothing
        ((450, 100), 50),  # half of it beside a product that ends at 500
        ((390, 100), 0),  # all of it
        ((690, 200), 140),  # around the optimizer's kernel of 60
    ],
)
def test_a_cuda_trace_with_known_overlap(
    collective: tuple[float, float], exposed: float, export: Callable[[Trace], Trace], tmp_path: Path
) -> None:
    file = tmp_path / "host_3.1.pt.trace.json"
    file.write_text(json.dumps(export(cuda_trace(collective))))
    trace = read_trace(file)
    report = report_rank(trace)
    assert (trace.rank, report.steps, report.launches, report.operators) == (3, 2, 5, 4)
    computing = 8 + 150 + 120 + 60
    expected = [990, computing, collective[1], exposed, 990 - computing - exposed]
    assert times(report) == [value / 1000 for value in expected]
    asked = collective[0] - 20  # within the range around that time, or none
    sent = {"backward": 340 <= asked < 540, "aflora.all_reduce": 550 <= asked < 640, "optimizer": 700 <= asked < 900}
    also = {name: collective[1] / 1000 * within for name, within in sent.items()}
    assert spans(report) == {
        "data loading": (0.080, 0),
        "forward": (0.200, 0.150),
        "backward": (0.200, round(0.120 + also["backward"], 6)),
        "aflora.all_reduce": (0.090, also["aflora.all_reduce"]),
        "optimizer": (0.200, round(0.060 + also["optimizer"], 6)),
    }
    (traffic,) = report.traffic
    assert (traffic.kind, traffic.calls, traffic.elements) == ("all_reduce", 1, 1024)
    assert (round(traffic.total_ms, 6), round(traffic.exposed_ms, 6)) == (collective[1] / 1000, exposed / 1000)


def grid(intervals: Sequence[tuple[float, float]], length: int) -> np.ndarray:
    """Which of the microseconds from 0 on some interval covers."""
    covered = np.zeros(length, dtype=bool)
    for start, end in intervals:
        covered[int(start) : int(end)] = True
    return covered


@pytest.mark.parametrize("seed", range(20))
def test_interval_arithmetic_equals_counting_microseconds(seed: int) -> None:
    draw = random.Random(seed)
    sets = []
    for _ in range(2):
        starts = [draw.randrange(300) for _ in range(draw.randrange(40))]
        sets.append([(start, start + draw.randrange(25)) for start in starts])
    one, other = map(union, sets)
    covered, also = (grid(intervals, 400) for intervals in sets)
    for found, expected in (
        (one, covered),
        (intersection(one, other), covered & also),
        (difference(one, other), covered & ~also),
    ):
        assert (grid(found, 400) == expected).all()
        assert total(found) == expected.sum()
        assert all(a < b for a, b in found)
        assert all(b[0] > a[1] or found is not one for a, b in pairwise(found))


@pytest.mark.parametrize("seed", range(10))
def test_random_device_work_equals_counting_microseconds(seed: int, tmp_path: Path) -> None:
    """Kernels, copies and collectives that overlap at random over streams, an evaluation in the middle."""
    draw = random.Random(seed)
    events: list[Trace] = []

    def add(cat: str, name: str, ts: int, dur: int, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur, "args": args})

    bounds = [0, *sorted(draw.sample(range(500, 4500), 3)), 5000]
    evaluation = (bounds[2] + 10, bounds[2] + 10 + draw.randrange(50, 300))
    add("user_annotation", "aflora.evaluate", evaluation[0], evaluation[1] - evaluation[0])
    for i, (start, end) in enumerate(pairwise(bounds)):
        add("user_annotation", f"ProfilerStep#{i}", start, end - start)
    work: dict[str, list[tuple[int, int]]] = {"kernel": [], "gpu_memcpy": [], "nccl": []}
    for i in range(150):
        kind = draw.choice(list(work))
        start = draw.randrange(-100, 5050)
        end = start + draw.randrange(1, 60)
        work[kind].append((max(start, 0), max(end, 0)))
        name = {"nccl": NCCL}.get(kind, "a_kernel")
        add("kernel" if kind == "nccl" else kind, name, start, end - start, correlation=i, **{"In msg nelems": 1})
    draw.shuffle(events)
    file = tmp_path / "host_0.1.pt.trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    report = report_rank(read_trace(file))
    inside = grid([(0, 5000)], 5200) & ~grid([evaluation], 5200)
    computing = grid(work["kernel"] + work["gpu_memcpy"], 5200) & inside
    communicating = grid(work["nccl"], 5200) & inside
    counts = [
        inside.sum(),
        computing.sum(),
        communicating.sum(),
        (communicating & ~computing).sum(),
        (inside & ~computing & ~communicating).sum(),
    ]
    assert times(report) == [pytest.approx(count / 4000) for count in counts]
    assert report.aside_ms == pytest.approx((evaluation[1] - evaluation[0]) / 1000)


def test_a_rank_waits_for_the_one_that_comes_last(cuda_run: Path) -> None:
    windows, notes = read_run(cuda_run)
    assert [(w.name, [r.rank for r in w.ranks]) for w in windows] == [(name, [0, 1]) for name in STANDARD]
    assert notes == []
    waited = [
        {rank: {other: round(ms, 6) for other, ms in waits.items()} for rank, waits in (w.waits_ms or {}).items()}
        for w in windows
    ]
    assert waited == [{0: {}, 1: {0: 0.06}}, {0: {}, 1: {0: 0.03}}, {0: {}, 1: {0: 0}}]


def test_collectives_are_matched_by_when_they_were_asked_for_not_by_when_they_ran(tmp_path: Path) -> None:
    """A rank whose device is late begins in its window what the step before asked for, and ends later than the host."""
    early, late = cuda_trace(), cuda_trace(collective=(585, 60))
    for event in late["traceEvents"]:
        if event["name"] == NCCL:
            event["ts"] += 700  # the last one runs after the last step
    early["traceEvents"].append(
        {"ph": "X", "cat": "kernel", "name": NCCL, "ts": 4_436_888_520_001, "dur": 9, "pid": 0, "tid": 20, "args": {}}
    )
    traces = [read_trace(write(tmp_path, "training", rank, trace)) for rank, trace in enumerate((early, late))]
    found = waits(traces)
    assert found is not None
    assert found[0] == {}
    assert found[1] == {0: pytest.approx(0.020)}


def test_the_ranks_of_different_collectives_are_not_compared(tmp_path: Path) -> None:
    other = cuda_trace()
    other["traceEvents"] = [
        event for event in other["traceEvents"] if event["name"] != NCCL or event["ts"] < 4_436_888_521_000
    ]
    write(tmp_path, "training", 0, cuda_trace())
    write(tmp_path, "training", 1, other)
    (window,), notes = read_run(tmp_path)
    assert window.waits_ms is None
    assert notes == ["training: the ranks did not take part in the same collectives; no waits are shown."]


# A real run


def recorded(file: Path) -> list[Trace]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


@pytest.mark.distributed
def test_a_real_run_reads_as_its_json_says(profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(profiled), "--json", str(tmp_path / "numbers.json")]) == 0
    said = capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [window["name"] for window in numbers["windows"]] == list(STANDARD)
    (row,) = (line.split() for line in said.splitlines() if line.startswith("step "))
    printed_steps = row[1:4]
    gave = []
    for window in numbers["windows"]:
        assert [rank["rank"] for rank in window["ranks"]] == [0, 1]
        files = sorted((profiled / "tensorboard" / "profile" / window["name"]).iterdir())
        for rank, file in zip(window["ranks"], files, strict=True):
            events = recorded(file)
            steps = [e for e in events if e["name"].startswith("ProfilerStep#")]
            first = min(e["ts"] for e in steps)
            length = int(max(e["ts"] + e["dur"] for e in steps) - first) + 1

            def covered(chosen: list[Trace], first: float = first, length: int = length) -> np.ndarray:
                """Tenths of microseconds."""
                edges = np.zeros(length * 10 + 2, dtype=np.int32)
                for e in chosen:
                    edges[min(max(round((e["ts"] - first) * 10), 0), length * 10)] += 1
                    edges[min(max(round((e["ts"] + e["dur"] - first) * 10), 0), length * 10)] -= 1
                return np.cumsum(edges)[:-1] > 0

            aside = [e for e in events if e["name"] in ("aflora.evaluate", "aflora.save")]
            inside = covered(steps) & ~covered(aside)
            operators = [e for e in events if e["name"].startswith("aten::") and e["tid"] == steps[0]["tid"]]
            sent = [e for e in events if e["name"].startswith("gloo:")]
            computing, sending = covered(operators) & inside, covered(sent) & inside
            per_step = 1e4 * len(steps)
            assert rank["steps"] == len(steps) == 3
            assert rank["step_ms"] == pytest.approx(inside.sum() / per_step, rel=1e-3)
            assert rank["computing_ms"] == pytest.approx(computing.sum() / per_step, rel=2e-2)
            assert rank["communication_ms"] == pytest.approx(sending.sum() / per_step, rel=2e-2)
            assert rank["exposed_ms"] == pytest.approx((sending & ~computing).sum() / per_step, rel=2e-2)
            parts = rank["computing_ms"] + rank["exposed_ms"] + rank["idle_ms"]
            assert parts == pytest.approx(rank["step_ms"])
            left_out = [(e["ts"], e["ts"] + e["dur"]) for e in aside]
            within = [e for e in events if e["ts"] >= first and not any(a <= e["ts"] < b for a, b in left_out)]
            for name in ("forward", "backward", "optimizer", "aflora.observe", "aflora.decide", "aflora.rebuild"):
                durations = [e["dur"] for e in within if e["name"] == name]
                mine = [r for r in rank["ranges"] if r["path"][-1] == name]
                assert sum(r["calls"] for r in mine) == pytest.approx(len(durations) / 3)
                assert sum(r["host_ms"] for r in mine) == pytest.approx(sum(durations) / 3e3, rel=1e-4)
            nested = {tuple(r["path"]) for r in rank["ranges"]}
            assert (("optimizer", "aflora.decide", "aflora.all_reduce") in nested) == (window["name"] == "2_middle")
        gave.append(fmean(t["elements"] for r in window["ranks"] for t in r["traffic"] if t["kind"] == "all_reduce"))
        mean = fmean(rank["step_ms"] for rank in window["ranks"])
        assert float(printed_steps.pop(0).replace(",", "")) == pytest.approx(mean, rel=5e-3)
    assert gave[0] > gave[2], "what is frozen is not sent any more"


def test_an_evaluation_within_a_window_belongs_to_no_update(arguments: list[str], tmp_path: Path) -> None:
    from aflora_dist.training.run import main as train

    assert train([*arguments, "--profile", "--profile.starts", "[4]", "--profile.steps", "4"]) == 0
    ((window,), notes) = read_run(tmp_path / "run")
    (rank,) = window.ranks
    (file,) = (tmp_path / "run" / "tensorboard" / "profile" / "1_from_4").iterdir()
    aside = [e["dur"] for e in recorded(file) if e["name"] in ("aflora.evaluate", "aflora.save")]
    assert len(aside) == 2
    assert rank.aside_ms == pytest.approx(sum(aside) / 1e3, rel=1e-4)
    assert {t.path: t.calls for t in rank.ranges}["forward",] == 1
    assert window.waits_ms is None
    assert notes == [f"1_from_4: {rank.aside_ms:,.0f} ms of evaluation and checkpoints lie in it and are left out."]


# Tables and pictures


def test_the_tables_are_markdown_in_which_names_stay_text(tmp_path: Path) -> None:
    trace = cuda_trace()
    for event in trace["traceEvents"]:
        if event["name"] == "aflora.all_reduce":
            event["name"] = "aflora.a|b"
    write(tmp_path, "training", 0, trace, world=1)
    windows, _ = read_run(tmp_path)
    step, host, *_ = (table.markdown() for table in tables(windows))
    assert "|exposed communication|0.040   4%|" in step
    assert "|aflora.a\\|b|" in host
    assert host.splitlines()[2:4] == ["||training|", "|---|---:|"]


def test_the_picture_has_a_bar_for_each_range_and_rank_of_each_window(cuda_run: Path) -> None:
    windows, _ = read_run(cuda_run)
    figure = window_bars(windows)
    above, below = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title() for axis in above] == ["before", "middle", "after"]
    ranges = [label.get_text().strip() for label in below[0].get_yticklabels()]
    assert ranges == ["data loading", "forward", "backward", "aflora.all_reduce", "optimizer"]
    for axis, window in zip(below, windows, strict=True):
        drawn = [bar.get_width() for bar in axis.patches]
        assert drawn == [pytest.approx(t.host_ms) for r in window.ranks for t in r.ranges]
    for axis, window in zip(above, windows, strict=True):
        lengths = [bar.get_width() for bar in axis.patches]
        parts = [(r.computing_ms, r.exposed_ms, r.idle_ms) for r in window.ranks]
        assert lengths == [pytest.approx(part) for three in parts for part in three]


# Missing, cut and foreign files


def test_what_is_missing_is_said(cuda_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = cuda_run / "tensorboard" / "profile"
    (profile / "1_before" / "a_host.example_1.1.pt.trace.json.gz").unlink()
    for file in (profile / "2_middle").iterdir():
        file.unlink()
    write(cuda_run, "3_after", 1, cuda_trace(), world=4)
    assert main([str(cuda_run)]) == 0
    said = capsys.readouterr().out
    assert "note: 2_middle has no trace that can be read." in said
    assert "note: 1_before has no trace of rank 1." in said
    assert "note: Of 4 ranks there are no traces of 2, 3." in said
    assert main([str(cuda_run), "--ranks", "0"]) == 0
    assert "note: 1_before has" not in capsys.readouterr().out


def test_odd_names_pipes_and_sizes_do_not_stop_it(
    cuda_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = cuda_run / "tensorboard" / "profile" / "1_before"
    os.mkfifo(window / "a_host_2.1.pt.trace.json")
    write(cuda_run, "3_after", 1, cuda_trace(), world=10**12)
    (cuda_run / "tensorboard" / "profile" / "2_middle").rename(window.parent / "\udcff")
    assert main([str(cuda_run)]) == 0
    said = capsys.readouterr().out
    assert f"note: {window / 'a_host_2.1.pt.trace.json'} is not a file." in said
    assert "note: Of 1000000000000 ranks there are no traces of 2, 3, 4, 5, 6, 7, 8, 9, ...." in said


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1500], "cut short or damaged"),
        (lambda data: b"", "cut short or damaged, after 0 events"),
        (lambda data: data[:2], "cut short or damaged"),
        (lambda data: gzip.decompress(data)[:-900], "cut short or damaged, after "),
        (lambda data: gzip.decompress(data).replace(b'"ph"', b'"ph', 1), "damaged, after "),
        (lambda data: b"PK\x03\x04 something else", "is no trace of PyTorch's: it is no JSON object"),
        (lambda data: b"[1, 2]", "is no trace of PyTorch's: it is no JSON object"),
        (lambda data: b"{}", "has no steps (ProfilerStep) in it"),
        (lambda data: b'{"traceEvents": 3}', "its traceEvents is not as it writes it"),
        (lambda data: b'{"traceEvents": [3]}', "its traceEvents is not as it writes it"),
        (lambda data: b'{"traceEvents": [{"ph": "X", "name": "n", "ts": "1"}]}', "its event 1 is not as it"),
        (lambda data: b'{"traceEvents": ' + b"[" * 100_000, "damaged"),
        (lambda data: b'{"distributedInfo": {"rank": "first"}}', "its distributedInfo is not as it writes it"),
    ],
)
def test_a_file_that_is_no_whole_trace_is_named_and_the_others_are_shown(
    damage: Callable[[bytes], bytes], said: str, cuda_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cuda_run / "tensorboard" / "profile" / "2_middle" / "a_host.example_1.1.pt.trace.json.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert main([str(cuda_run)]) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if str(file) in line)
    assert said in line
    assert "note: 2_middle has no trace of rank 1." in printed
    ranks = printed[printed.index("Ranks, ms per step") :].splitlines()
    assert [line.split()[1] for line in ranks if line.startswith("middle")] == ["0"]


def test_a_trace_cut_anywhere_is_never_a_traceback(tmp_path: Path) -> None:
    text = json.dumps(for_plugin(cuda_trace()))
    file = tmp_path / "host_0.1.pt.trace.json"
    for length in range(0, len(text), 37):
        file.write_text(text[:length])
        with pytest.raises(TraceError, match=r"host_0.*(cut short|damaged)"):
            read_trace(file)
    file.write_text(text)
    whole = gzip.compress(text.encode())
    for length in range(3, len(whole) - 1, 11):
        file.write_bytes(whole[:length])
        with pytest.raises(TraceError, match=r"host_0.*(cut short|damaged)"):
            read_trace(file)


@pytest.mark.parametrize("strange", [None, "x", -1, 1e400, [], {}, [["x"]], True])
def test_an_event_with_anything_in_it_is_never_a_traceback(strange: Any, tmp_path: Path) -> None:
    file = tmp_path / "host_0.1.pt.trace.json"
    gloo = {"ph": "X", "cat": "cpu_op", "name": "gloo:all_reduce", "ts": 1, "dur": 2, "pid": 1, "tid": 1}
    gloo["args"] = {"Input Dims": [[3], [[2, 2]]]}
    trace = for_plugin(cuda_trace())
    trace["traceEvents"] = [gloo, *trace["traceEvents"][:12]]
    refused = 0
    for event in trace["traceEvents"]:
        for place in (event, event.get("args", {})):
            for key in place:
                before, place[key] = place[key], strange
                file.write_text(json.dumps(trace))
                place[key] = before
                try:
                    report_rank(read_trace(file))
                    waits([read_trace(file)] * 2)
                except TraceError:
                    refused += 1
    assert refused


@pytest.mark.parametrize("content", ["nothing", "an empty folder", "bad files"])
def test_a_run_without_traces_is_refused_in_a_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content != "nothing":
        (tmp_path / "tensorboard" / "profile" / "1_before").mkdir(parents=True)
    if content == "bad files":
        (tmp_path / "tensorboard" / "profile" / "1_before" / "notes.txt").write_text("hello")
    assert main([str(tmp_path), "--json", str(tmp_path / "numbers.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"aflora: error: {tmp_path} has no traces")
    assert said.count("\n") == 1
    assert not (tmp_path / "numbers.json").exists()


def test_results_that_cannot_be_written_are_an_error_in_a_line(
    cuda_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(cuda_run), "--json", str(tmp_path / "nowhere" / "numbers.json")]) == 2
    assert "The numbers could not be written to" in capsys.readouterr().err


def test_snapshots_of_memory_are_named_and_not_read(cuda_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cuda_run / "tensorboard" / "profile" / "2_middle" / "host_0.memory.pickle"
    file.write_bytes(b"\x80")
    assert main([str(cuda_run)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if str(file) in line)
    assert "memory_viz" in line


# Size


def test_the_size_of_a_trace_costs_its_text_and_not_its_events(tmp_path: Path) -> None:
    trace = cuda_trace()
    shapes = {"Input Dims": [[17, 3]] * 400, "Input type": ["float"] * 400}
    trace["traceEvents"] += [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "pid": 1, "tid": 2, "ts": i, "dur": 1, "args": shapes}
        for i in range(400)
    ]
    file = write(tmp_path, "training", 0, trace)
    size = len(gzip.decompress(file.read_bytes()))
    assert size > 2_000_000
    tracemalloc.start()
    try:
        read_trace(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size, f"{peak:,} of {size:,} bytes"


def test_another_trace_of_the_same_rank_is_said(cuda_run: Path) -> None:
    folder = cuda_run / "tensorboard" / "profile" / "1_before"
    (folder / "b_host_0.1.pt.trace.json").write_text(json.dumps(cuda_trace()))
    _, notes = read_run(cuda_run)
    assert notes == [f"{folder / 'b_host_0.1.pt.trace.json'} is another trace of rank 0 and is left out."]


def test_ranks_that_are_not_there_are_an_error(cuda_run: Path) -> None:
    with pytest.raises(AFLoRAError, match="has no traces that can be read"):
        read_run(cuda_run, [7])
