"""`make gpu` itself: what fails, hangs or is missing costs only itself. Needs no GPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from profiling import compare, gpu
from profiling.gpu import Section, run

SCRIPTS = {
    "passes": "print('seen')",
    "fails": "import sys; print('why'); sys.exit(3)",
    # As torchrun does: the rank is in a session of its own, and takes no hint.
    "hangs": """
import subprocess, sys, time
rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
rank = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True, stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(600)
""",
}


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, Section]:
    made = {}
    for name, script in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(script)
        made[name] = Section(name, f"one that {name}", str(tmp_path / f"{name}.py"), seconds=30)
    return made


def test_a_section_that_fails_or_hangs_or_is_left_out_costs_only_itself(
    fake: dict[str, Section], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    first = replace(fake["passes"], result=lambda folder, printed: f"it has {printed.strip()}")
    chosen = [
        first,
        fake["fails"],
        replace(fake["hangs"], seconds=2),
        replace(fake["passes"], name="without", needs=("torch", "a_package_that_nobody_has")),
        replace(fake["passes"], name="unreadable", result=lambda folder, printed: (folder / "no.json").read_text()),
        replace(first, name="last", files={"given.json": {"overlap_comm": True}}),
    ]
    began = time.monotonic()
    outcomes = run(chosen, tmp_path / "out", seconds=60)
    assert time.monotonic() - began < 30
    statuses = [outcome.status for outcome in outcomes]
    assert statuses[:4] == [
        "passed",
        "failed: exit status 3",
        "failed: ended after its limit of 2 s",
        "left out: no a_package_that_nobody_has",
    ]
    assert statuses[4].startswith("failed: its result cannot be read (FileNotFoundError")
    assert statuses[5] == "passed"
    rank = int((tmp_path / "out" / "hangs" / "log.txt").read_text())
    assert not psutil.pid_exists(rank) or psutil.Process(rank).status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "out" / "fails" / "log.txt").read_text() == "why\n"
    assert json.loads((tmp_path / "out" / "last" / "given.json").read_text()) == {"overlap_comm": True}
    said = capsys.readouterr().out
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "| passes | one that passes | passed | it has seen | 0 |" in table
    assert "| fails | one that fails | failed: exit status 3 |  | 0 |" in table
    assert table.splitlines()[-1] in said
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [row["status"] for row in rows] == statuses


def test_sections_for_which_no_time_is_left_fail(fake: dict[str, Section], tmp_path: Path) -> None:
    outcomes = run([replace(fake["hangs"], seconds=30), fake["passes"]], tmp_path / "out", seconds=1)
    assert [outcome.status for outcome in outcomes] == [
        "failed: ended after its limit of 1 s",
        "failed: no time was left for it",
    ]


def test_the_exit_status_says_whether_something_failed(
    fake: dict[str, Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "without_gpu", lambda: "")
    monkeypatch.setattr(gpu, "gpus", lambda: 1)
    monkeypatch.setattr(gpu, "sections", lambda ranks: list(fake.values()))
    arguments = ["--out", str(tmp_path / "out"), "--sections"]
    assert gpu.main([*arguments, "passes"]) == 0
    assert gpu.main([*arguments, "passes", "fails"]) == 1
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*arguments, "another"])


def test_without_a_gpu_it_says_so_in_a_sentence_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "GPU" in said
    assert not (tmp_path / "out").exists()


def test_the_plan_fits_into_30_minutes_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "deepspeed" else True)
    assert gpu.main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert "Missing: deepspeed." in said
    assert said.count("LEFT OUT: no deepspeed") == 6
    chosen = gpu.sections(ranks=1)
    assert sum(section.seconds for section in chosen) <= gpu.MINUTES * 60
    assert len({section.name for section in chosen}) == len(chosen)
    for section in chosen:  # their options are known
        if section.command.startswith("-m profiling.compare"):
            compare.arguments(section.arguments(tmp_path)[3:])


def test_results_are_read_from_what_the_measurements_write(tmp_path: Path) -> None:
    memory = [{"step": n, "allocated": held} for n, held in ((0, 5e6), (9, 4e6), (12, 4.5e6), (15, 2e6))]
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    assert gpu.freed(tmp_path, "") == "5.0 MB before, 2.0 MB after 3 freezes; it rose at 1 of them"
    ours = {"step_seconds_median": 0.05, "ratio_to_floor": 1.1, "ratio_to_lora": 0.9, "ratio_to_elora": 0.5}
    (tmp_path / "compare.json").write_text(json.dumps({"methods": {"aflora": ours}}))
    assert "50.0 ms a step, 1.10 x floor, 0.90 x LoRA, ELoRA 2.00 x it" in gpu.compared(tmp_path, "")


@pytest.mark.distributed
def test_the_main_job_of_a_deepspeed_section_trains_on_made_up_data(tmp_path: Path) -> None:
    """Small, in float32 and on two CPU ranks."""
    section = gpu.deepspeed(2, overlap=True, ranks=2)
    command = section.command.replace("bf16", "no") + " --layers 1 --batch 4 --updates 1"
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    section = replace(section, command=command, environment=environment)
    outcome = gpu.run_one(section, tmp_path / section.name, seconds=400)
    assert outcome.status == "passed", (tmp_path / section.name / "log.txt").read_text()[-3000:]
    assert outcome.result.endswith("examples/s, zero2 on 2")
