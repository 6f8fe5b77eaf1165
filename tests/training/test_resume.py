"""Checkpoints and what comes of going on from them, against an undisturbed run."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from aflora_dist.store import checkpoint
from aflora_dist.training.run import main
from tests.launch import ENGINES, ROOT, free_port, launch, launch_arguments, launch_series

ALL = ("single", *ENGINES)
PAIRS = [*itertools.product(ALL, ALL), ("single", "offload"), ("offload", "single"), ("offload", "offload")]
PAIRS += [("ddpx4", "ddpx4"), ("ddpx4", "zero2")]
KINDS = {"single": ("single", 1), "offload": ("zero3", 2), "ddpx4": ("ddp", 4)}
LONG = 40  # epochs of a run that can be caught in the act
SAVED = 10  # of 24 updates: within the second epoch of four, between two freezes
SAVED_NAME = f"step_{SAVED:08d}"


def options(folder: Path, model: Path, data: Path, **more: Any) -> list[str]:
    chosen = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.save_every": 5,
        "run.keep": 100,
        "run.tensorboard": False,
        "model.name": model,
        "data.task": "files",
        "data.train_file": data / "train.csv",
        "data.validation_file": data / "dev.csv",
        "train.epochs": 4,
        "train.batch_size": 16,
        "freezing.initial_epochs": 0.5,
        "freezing.final_epochs": 1,
        **more,
    }
    return [part for key, value in chosen.items() for part in (f"--{key}", str(value))]


def start(engine: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The main job on two ranks, or in this process ("single")."""
    if engine != "single":
        return launch(engine, 2, "-m", "aflora_dist.training.run", *arguments)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start_all(engine: str, runs: list[list[str]]) -> list[str]:
    """The main job with each of these command lines, in one launch ("x4": on four ranks; "offload": ZeRO-3 with CPU
    Adam); what each printed."""
    if engine == "single":
        done = [start(engine, arguments) for arguments in runs]
        assert [d.returncode for d in done] == [0] * len(done), [d.stderr for d in done]
        return [d.stdout for d in done]
    series = [["aflora_dist.training.run", *arguments] for arguments in runs]
    if engine == "offload":
        launcher = ["--config_file", "launch/zero3_offload.yaml", "--num_processes", "2"]
        return launch_series("zero3", 2, series, launcher=[*launcher, "--main_process_port", str(free_port())])
    return launch_series(engine.removesuffix("x4"), 4 if engine.endswith("x4") else 2, series)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def freezes(folder: Path) -> list[tuple[int, list[str]]]:
    return [(event["step"], event["frozen"]) for event in lines(folder, "freeze_log.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_to_the_bit(ours: Path, undisturbed: Path) -> None:
    """Losses, freeze log with scores, evaluations, weights."""
    assert [m["loss"] for m in lines(ours, "metrics.jsonl")] == [m["loss"] for m in lines(undisturbed, "metrics.jsonl")]
    logs = [[{**e, "rebuild_seconds": 0} for e in lines(f, "freeze_log.jsonl")] for f in (ours, undisturbed)]
    assert logs[0] == logs[1]
    results = [json.loads((f / "result.json").read_text()) for f in (ours, undisturbed)]
    for key in ("evaluations", "steps", "avg_trainable_params"):
        assert results[0][key] == results[1][key]
    mine, theirs = weights(ours), weights(undisturbed)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(engine, epochs) -> directory of an uninterrupted run with checkpoints after every 5 updates."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(engine: str, epochs: int = 4) -> Path:
        ended = folder / f"{engine}_{epochs}"
        if not ended.exists():
            start_all(engine, [options(ended, tiny_model, reviews, **{"train.epochs": epochs})])
        return ended

    return run


@pytest.fixture(scope="session")
def resumed(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, tuple[Path, str]]]:
    """target -> for each source: directory and output of a run on `target` that goes on from the source's."""
    folder = tmp_path_factory.mktemp("resumed")

    @functools.cache
    def run(target: str) -> dict[str, tuple[Path, str]]:
        begun = {source: undisturbed(source) for source, other in PAIRS if other == target}
        folders = {source: folder / f"{source}_{target}" for source in begun}
        runs = [
            [
                *options(folders[source], tiny_model, reviews),
                "--resume",
                str(begun[source] / "checkpoints" / SAVED_NAME),
            ]
            for source in begun
        ]
        return dict(zip(begun, zip(folders.values(), start_all(target, runs), strict=True), strict=True))

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_engine_goes_on_from_any_other(
    source: str,
    target: str,
    undisturbed: Callable[..., Path],
    resumed: Callable[[str], dict[str, tuple[Path, str]]],
) -> None:
    folder, said = resumed(target)[source]
    assert f"Going on after step {SAVED - 1}" in said
    result = json.loads((folder / "result.json").read_text())
    assert (result["engine"], result["world_size"]) == KINDS.get(target, (target, 2))
    ours, expected = lines(folder, "metrics.jsonl"), lines(undisturbed("single"), "metrics.jsonl")
    assert [line["step"] for line in ours] == list(range(SAVED, 24))
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in expected[SAVED:]], abs=1e-5)
    assert freezes(folder) == freezes(undisturbed("single"))
    mine, theirs = weights(folder), weights(undisturbed("single"))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-5)
    if source == target:
        begun = undisturbed(source)
        assert [m["loss"] for m in ours] == [m["loss"] for m in lines(begun, "metrics.jsonl")[SAVED:]]
        theirs = weights(begun)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "precision"), [("ddp", "bf16"), ("zero2", "fp16"), ("zero3", "bf16")])
def test_half_precision_goes_on_to_the_bit(
    engine: str, precision: str, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """fp16 with its loss scale: DeepSpeed begins with 2**16 and changes it at every overflow."""
    whole = tmp_path / "whole"
    saved = str(whole / "checkpoints" / SAVED_NAME)
    runs = [options(whole, tiny_model, reviews), [*options(tmp_path / "cut", tiny_model, reviews), "--resume", saved]]
    launch_series(engine, 2, [["tests.workers.half", *arguments] for arguments in runs], mixed_precision=precision)
    assert json.loads((whole / "result.json").read_text())["mixed_precision"] == precision
    assert freezes(tmp_path / "cut") == freezes(whole)
    losses = [[line["loss"] for line in lines(folder, "metrics.jsonl")] for folder in (whole, tmp_path / "cut")]
    assert losses[1] == losses[0][SAVED:]
    mine, theirs = weights(tmp_path / "cut"), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("after", [1, 2, 4, 6, 9, 12, 23, 24])
def test_one_process_goes_on_to_the_bit_from_any_update(
    after: int, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """With dropout and accumulation; before, between and after freezes; within and at the end of an epoch."""
    more = {"run.save_every": 1, "adapter.dropout": 0.1, "train.accumulation": 2, "run.log_every": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(options(whole, tiny_model, reviews, **more)) == 0
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "adapter")
    for path in checkpoint.list_checkpoints(cut / "checkpoints"):
        if path.name > f"step_{after:08d}":
            shutil.rmtree(path)
    assert main([*options(cut, tiny_model, reviews, **more), "--resume"]) == 0
    assert_same_to_the_bit(cut, whole)


def test_resume_begins_where_there_is_nothing_and_ends_where_all_is_done(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--resume"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*arguments, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("AFLoRA on") == 2


def test_a_checkpoint_of_another_configuration_model_or_data_is_refused(
    undisturbed: Callable[..., Path],
    tiny_model: Path,
    reviews: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    saved = str(undisturbed("single") / "checkpoints" / SAVED_NAME)
    ours = options(tmp_path / "run", tiny_model, reviews)
    held = tmp_path / "held"
    held.mkdir()
    (held / "config.yaml").write_text("of another run")
    vanished = tmp_path / "vanished"
    vanished.mkdir()
    other = tmp_path / "other"
    shutil.copytree(reviews, other)
    (other / "train.csv").write_text((reviews / "train.csv").read_text() + "good film,positive\n")
    wider = tmp_path / "wider"
    shutil.copytree(undisturbed("single") / "checkpoints" / SAVED_NAME, wider)
    training = json.loads((wider / "training.json").read_text())
    name = next(iter(training["adaptive"]["numels"]))
    training["adaptive"]["numels"][name] += 1
    (wider / "training.json").write_text(json.dumps(training))
    (wider / "manifest.json").write_text(
        json.dumps({n: checkpoint._fingerprint(wider / n) for n in ("state.safetensors", "training.json")})
    )
    for arguments, complaint in (
        (
            [*ours, "--train.seed", "1", "--adapter.r", "8", "--resume", saved],
            "adapter.r is 4 there and 8 here; train.seed",
        ),
        ([*options(tmp_path / "run", tiny_model, other), "--resume", saved], "on other training data"),
        ([*options(held, tiny_model, reviews), "--resume", saved], f"{held} already holds a run (config.yaml)"),
        ([*options(tmp_path / "run", tiny_model, vanished), "--resume", saved], "train.csv"),
        ([*ours, "--resume", str(wider)], f"of another model: {name} has"),
        ([*ours, "--resume", str(tmp_path / "nowhere")], "is not a checkpoint's folder"),
        ([*ours, "--resume", "--run.overwrite", "true"], "choose one"),
    ):
        assert main(arguments) == 2
        assert complaint in capfd.readouterr().err
    assert (held / "config.yaml").read_text() == "of another run"


def test_what_does_not_change_the_training_may_differ(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(reviews, moved)
    saved = str(undisturbed("single") / "checkpoints" / SAVED_NAME)
    more = {"train.accumulation": 4, "train.eval_batch_size": 7, "run.log_every": 2}
    assert main([*options(tmp_path / "run", tiny_model, moved, **more), "--resume", saved]) == 0
    assert freezes(tmp_path / "run") == freezes(undisturbed("single"))


def test_a_full_disk_ends_in_an_error_and_spares_what_was_saved(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """From the third checkpoint on no file may grow beyond 20 kB; a checkpoint's state is larger."""
    code = (
        "import resource, sys; from aflora_dist.store import checkpoint; from aflora_dist.training import run\n"
        "save = checkpoint.save\n"
        "def limited(folder, step, *rest, **more):\n"
        "    if step >= 15: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    return save(folder, step, *rest, **more)\n"
        "checkpoint.save = limited\n"
        "sys.exit(run.main(sys.argv[1:]))"
    )
    arguments = options(tmp_path / "run", tiny_model, reviews)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=240)
    assert done.returncode == 2, done.stderr
    assert "A checkpoint could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    found, complaints = checkpoint.newest_good(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.path.name == "step_00000010"
    assert not complaints
    whole = tmp_path / "whole"
    assert main(options(whole, tiny_model, reviews)) == 0
    assert main([*arguments, "--resume"]) == 0
    assert_same_to_the_bit(tmp_path / "run", whole)


def begin(engine: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a run in the background."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "accelerate.commands.launch", *launch_arguments(engine, 2)] if engine != "single" else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "aflora_dist.training.run", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes, rank 0 first."""
    family = psutil.Process(process.pid).children(recursive=True)
    return sorted((p for p in family if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["USR1 to one rank", "TERM to one rank", "stop file"])
def test_a_wish_to_stop_saves_and_leaves_together(
    how: str, undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews, **{"run.save_every": 0, "train.epochs": LONG})
    process = begin("ddp", arguments)
    wait_for(lambda: (folder / "metrics.jsonl").exists(), process)
    if how == "stop file":
        (folder / "stop").touch()
    else:
        ranks(process)[1].send_signal(signal.SIGUSR1 if how.startswith("USR1") else signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    if (folder / "result.json").exists():
        pytest.fail("the run ended before it noticed")
    assert process.returncode == 0, said
    assert "Stopped as asked, after step" in said
    assert not (folder / "stop").exists()
    (saved,) = checkpoint.list_checkpoints(folder / "checkpoints")
    assert checkpoint.load(saved).training["log"]["step"] == len(lines(folder, "metrics.jsonl"))
    if how != "USR1 to one rank":
        return  # once is enough
    done = start("ddp", [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_to_the_bit(folder, undisturbed("ddp", LONG))


@pytest.mark.distributed
def test_a_second_job_on_one_directory_is_refused_until_the_first_is_gone(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews, **{"train.epochs": 400})
    first = begin("single", arguments)
    wait_for(lambda: (folder / "metrics.jsonl").exists(), first)
    second = start("single", [*arguments, "--resume"])
    assert second.returncode == 2
    assert f"Another job is at work in {folder}: process {first.pid} on" in second.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    third = begin("single", [*arguments, "--resume"])
    count = len(lines(folder, "metrics.jsonl"))
    wait_for(lambda: len(lines(folder, "metrics.jsonl")) > count + 10, third)
    third.terminate()
    assert "Stopped as asked" in third.communicate(timeout=60)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_with_a_message_and_resume_gives_the_same(
    victim: int, undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews, **{"train.epochs": LONG})
    process = begin("zero2", arguments)
    wait_for(lambda: (folder / "checkpoints" / "step_00000005").exists(), process)
    ranks(process)[victim].kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said or "another rank has ended" in said
    done = start("zero2", [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_to_the_bit(folder, undisturbed("zero2", LONG))


def test_a_finished_run_branches_off_from_an_older_checkpoint_and_keeps_what_it_came_to(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    arguments = options(folder, tiny_model, reviews, **{"run.keep": 3})
    assert main(arguments) == 0
    shutil.copytree(folder, whole)
    assert main([*arguments, "--resume", str(folder / "checkpoints" / "step_00000010")]) == 0
    for name in ("result.json", "freeze_log.jsonl", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / f"abandoned_{name}").read_bytes() == (whole / name).read_bytes()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["abandoned_step_00000015", "abandoned_step_00000020"] + [f"step_000000{n}" for n in (10, 15, 20)]
    assert_same_to_the_bit(folder, whole)


@pytest.mark.distributed
def test_a_short_campaign_of_kills() -> None:
    """`python -m tests.faults` is the long one."""
    from tests import faults

    hit = faults.main(["--kills", "3", "--engine", "single"])
    assert hit["everything"] == 3
    assert hit["runs compared"] >= 1
