"""Checkpoints and what comes of going on from them, against an undisturbed run."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from aflora_dist.store import checkpoint
from aflora_dist.training.run import main
from tests import faults
from tests.launch import ENGINES, ROOT, launch, launch_series
from tests.runs import assert_same_to_the_bit, begin_job, freezes, lines, options, start, start_all, wait_for, weights
from tests.selection import is_chosen

ALL = ("single", *ENGINES, "fsdp2")
# Each engine goes on from itself, to the bit, and from two others, one before it and one after; ZeRO-2 from every one.
PAIRS = [(source, ALL[(at + ahead) % len(ALL)]) for ahead in (0, 1, 4) for at, source in enumerate(ALL)]
PAIRS += [("single", "zero2"), ("ddp", "zero2"), ("zero2", "fsdp2"), ("zero3", "zero2")]
PAIRS += [("single", "offload"), ("offload", "single"), ("offload", "offload")]
PAIRS += [("ddpx4", "ddpx4"), ("ddpx4", "zero2")]
KINDS = {"single": ("single", 1), "offload": ("zero3", 2), "ddpx4": ("ddp", 4)}
SAVED = 10  # of 24 updates: within the second epoch of four, between two freezes
SAVED_NAME = f"step_{SAVED:08d}"


def sign(saved: Path) -> None:
    """Have a checkpoint be whole that was changed by hand."""
    found = {name: checkpoint._fingerprint(saved / name) for name in ("state.safetensors", "training.json")}
    (saved / "manifest.json").write_text(json.dumps(found))


@pytest.fixture(scope="session")
def resumed(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, tuple[Path, str]]]:
    """target -> for each source: directory and output of a run on `target` that goes on from the source's."""
    folder = tmp_path_factory.mktemp("resumed")

    @functools.cache
    def run(target: str) -> dict[str, tuple[Path, str]]:
        test = f"tests/store/test_resume.py::{test_any_engine_goes_on_from_any_other.__name__}"
        sources = [source for source, other in PAIRS if other == target and is_chosen(f"{test}[{source}-{target}]")]
        begun = {source: undisturbed(source) for source in sources}
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
    source: str, target: str, undisturbed: Callable[..., Path], resumed: Callable[[str], dict[str, tuple[Path, str]]]
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


OFFICIAL = {  # the authors' rule, saved in the middle of a window; a pooler that keeps its random start
    "freezing.rule": "quantile",
    "freezing.every": 4,
    "model.train_new": '["classifier"]',
    "train.decay_biases": False,
    "data.pad_to_max_length": True,
    "data.max_length": 16,
}


@pytest.mark.distributed
def test_the_authors_recipe_goes_on_on_any_engine(tiny_model: Path, reviews: Path, tmp_path: Path) -> None:
    whole, model = tmp_path / "whole", tmp_path / "model"
    shutil.copytree(tiny_model, model)
    stored = load_file(model / "model.safetensors")
    stored = {name: value for name, value in stored.items() if not name.startswith("pooler.")}
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    start("single", options(whole, model, reviews, **OFFICIAL))
    assert freezes(whole)[0][0] < SAVED < freezes(whole)[-1][0]
    assert all(step % 4 == 0 or step > 18 for step, _ in freezes(whole))
    expected = weights(whole)
    pooler = {name: value for name, value in expected.items() if ".pooler." in name}
    assert pooler
    saved = ["--resume", str(whole / "checkpoints" / SAVED_NAME)]
    for engine in ("single", "ddp", "zero2", "zero3", "fsdp2"):
        start_all(engine, [[*options(tmp_path / engine, model, reviews, **OFFICIAL), *saved]])
        assert freezes(tmp_path / engine) == freezes(whole)
        for name, value in weights(tmp_path / engine).items():
            if engine == "single" or name in pooler:
                assert torch.equal(value, expected[name]), name
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


SAVING = {"run.save_every": 1, "adapter.dropout": 0.1, "train.accumulation": 2, "run.log_every": 3}


@pytest.fixture(scope="module")
def saved_always(tiny_model: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with dropout and accumulation that was saved after every update."""
    folder = tmp_path_factory.mktemp("saved_always") / "run"
    assert main(options(folder, tiny_model, reviews, **SAVING)) == 0
    return folder


@pytest.mark.parametrize("after", [1, 2, 4, 6, 9, 12, 23, 24])
def test_one_process_goes_on_to_the_bit_from_any_update(
    after: int, saved_always: Path, tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """Before, between and after freezes; within and at the end of an epoch."""
    cut = tmp_path / "cut"
    shutil.copytree(saved_always, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "adapter")
    for path in checkpoint.list_checkpoints(cut / "checkpoints"):
        if path.name > f"step_{after:08d}":
            shutil.rmtree(path)
    assert main([*options(cut, tiny_model, reviews, **SAVING), "--resume"]) == 0
    assert_same_to_the_bit(cut, saved_always)


def test_resume_begins_where_there_is_nothing_and_ends_where_all_is_done(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--resume"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*arguments, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("AFLoRA on") == 2


def test_a_checkpoint_of_another_configuration_model_or_data_is_refused(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    name = next(iter(training["progress"]["engine"]["numels"]))
    training["progress"]["engine"]["numels"][name] += 1
    (wider / "training.json").write_text(json.dumps(training))
    sign(wider)
    for arguments, complaint in (
        (
            [*ours, "--train.seed", "1", "--adapter.r", "8", "--resume", saved],
            "adapter.r is 4 there and 8 here; train.seed",
        ),
        ([*options(tmp_path / "run", tiny_model, other), "--resume", saved], "is of a run on other training data"),
        ([*options(held, tiny_model, reviews), "--resume", saved], f"{held} already holds a run (config.yaml)"),
        ([*options(tmp_path / "run", tiny_model, vanished), "--resume", saved], "train.csv"),
        ([*ours, "--resume", str(wider)], f"of another model: {name} has"),
        ([*ours, "--resume", str(tmp_path / "nowhere")], "is not a checkpoint's folder"),
        ([*ours, "--resume", "--run.overwrite", "true"], "choose one"),
    ):
        assert main(arguments) == 2
        assert complaint in capfd.readouterr().err
    assert (held / "config.yaml").read_text() == "of another run"


@pytest.mark.distributed
def test_a_partition_of_zero_takes_no_count_of_updates_that_its_members_do_not_share(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """As mixtures of experts leave them under DDP, where a parameter without a gradient is not updated."""
    saved = tmp_path / SAVED_NAME
    shutil.copytree(undisturbed("single") / "checkpoints" / SAVED_NAME, saved)
    training = json.loads((saved / "training.json").read_text())
    name = next(name for name in training["progress"]["engine"]["state"] if name.endswith("s_b"))
    training["progress"]["engine"]["state"][name]["scalars"]["step"] -= 1
    (saved / "training.json").write_text(json.dumps(training))
    sign(saved)
    arguments = [*options(tmp_path / "run", tiny_model, reviews), "--resume", str(saved)]
    done = start("zero2", arguments)
    assert done.returncode == 2, done.stderr
    assert f"and {name} have had different numbers of updates ({{'step': 10.0}} and {{'step': 9.0}})" in done.stderr
    assert not (tmp_path / "run").exists()
    assert start("single", arguments).returncode == 0


def test_what_does_not_change_the_training_may_differ(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(reviews, moved)
    saved = str(undisturbed("single") / "checkpoints" / SAVED_NAME)
    more = {"train.accumulation": 4, "train.eval_batch_size": 7, "run.log_every": 2}
    assert main([*options(tmp_path / "run", tiny_model, moved, **more), "--resume", saved]) == 0
    assert freezes(tmp_path / "run") == freezes(undisturbed("single"))


def test_a_base_model_that_was_moved_is_known_by_its_weights(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    saved = ["--resume", str(undisturbed("single") / "checkpoints" / SAVED_NAME)]
    shutil.copytree(tiny_model, tmp_path / "moved")
    done = start("single", [*options(tmp_path / "run", tmp_path / "moved", reviews), *saved])
    assert f"From here on model.name={tmp_path / 'moved'}; it was {tiny_model}." in done.stdout
    mine, theirs = weights(tmp_path / "run"), weights(undisturbed("single"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    save_file(
        {**tensors, "pooler.dense.bias": tensors["pooler.dense.bias"] + 1}, tmp_path / "moved" / "model.safetensors"
    )
    other = start("single", [*options(tmp_path / "other", tmp_path / "moved", reviews), *saved])
    assert other.returncode == 2
    assert "is of a run on other base weights than what was loaded now" in other.stderr
    assert not (tmp_path / "other").exists()


def test_another_precision_is_said(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the launcher's, and no option that would be compared."""
    then = undisturbed("single") / "checkpoints" / SAVED_NAME
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state()
    try:
        first = start("single", [*options(tmp_path / "a", tiny_model, reviews), "--resume", str(then)]).stdout
        then = tmp_path / "a" / "checkpoints" / "step_00000015"
        again = start("single", [*options(tmp_path / "b", tiny_model, reviews), "--resume", str(then)]).stdout
    finally:
        AcceleratorState._reset_state()
    assert "From here on --mixed_precision bf16; it was no." in first
    assert "Going on after step 14" in again
    assert "mixed_precision" not in again


@pytest.mark.distributed
def test_a_full_disk_ends_in_an_error_and_spares_what_was_saved(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """From the third checkpoint on no file may grow beyond 20 kB; a checkpoint's state is larger."""
    arguments = options(tmp_path / "run", tiny_model, reviews)
    done = launch("single", 1, str(ROOT / "tests" / "workers" / "full_disk.py"), "20000", "15", *arguments)
    assert done.returncode == 2, done.stderr
    assert "A checkpoint could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    found, complaints = checkpoint.newest_good(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.path.name == "step_00000010"
    assert not complaints
    assert main([*arguments, "--resume"]) == 0
    assert_same_to_the_bit(tmp_path / "run", undisturbed("single"))


def struck(what: str, rank: int, update: int, arguments: list[str]) -> list[str]:
    """The command of the main job in which something happens to a rank as it begins an update."""
    return [str(ROOT / "tests" / "workers" / "struck.py"), what, str(rank), str(update), *arguments]


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["USR1 to one rank", "TERM to one rank", "stop file"])
def test_a_wish_to_stop_saves_and_leaves_together(
    how: str, undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews, **{"run.save_every": 0})
    what = {"USR1": "SIGUSR1", "TERM": "SIGTERM", "stop": "stop"}[how.split()[0]]
    done = launch("ddp", 2, *struck(what, 1, 9, arguments))
    assert done.returncode == 0, done.stderr
    assert not (folder / "result.json").exists()
    assert "Stopped as asked, after step" in done.stdout
    assert not (folder / "stop").exists()
    (saved,) = checkpoint.list_checkpoints(folder / "checkpoints")
    assert checkpoint.load(saved).training["progress"]["step"] == len(lines(folder, "metrics.jsonl"))
    if how != "USR1 to one rank":
        return  # once is enough
    done = start("ddp", [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_to_the_bit(folder, undisturbed("ddp"))


@pytest.mark.distributed
def test_a_second_job_on_one_directory_is_refused_until_the_first_is_gone(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews, **{"train.epochs": 400})
    first = begin_job("single", arguments)
    wait_for(lambda: (folder / "metrics.jsonl").exists(), first)
    second = start("single", [*arguments, "--resume"])
    assert second.returncode == 2
    assert f"Another job is at work in {folder}: process {first.pids[0]} on" in second.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    third = begin_job("single", [*arguments, "--resume"])
    count = len(lines(folder, "metrics.jsonl"))
    wait_for(lambda: len(lines(folder, "metrics.jsonl")) > count + 10, third)
    third.send_signal(signal.SIGTERM, rank=0)
    assert "Stopped as asked" in third.communicate(timeout=60)[0]


def assert_resume_gives_the_same(arguments: list[str], folder: Path, undisturbed: Path) -> None:
    assert not (folder / "result.json").exists()
    done = start("zero2", [*arguments, "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_to_the_bit(folder, undisturbed)


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_with_a_message_and_resume_gives_the_same(
    victim: int, undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    """While it begins an update, where the other waits for it; tests/faults.py kills at any moment."""
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews)
    done = launch("zero2", 2, *struck("SIGKILL", victim, 9, arguments), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert ("another rank has ended" in done.stderr) == (victim == 1)  # one rank speaks for all of a machine
    assert_resume_gives_the_same(arguments, folder, undisturbed("zero2"))


@pytest.mark.distributed
def test_a_rank_killed_under_the_launcher_ends_the_job_and_resume_gives_the_same(
    undisturbed: Callable[..., Path], tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews)
    done = launch("zero2", 2, *struck("SIGKILL", 1, 9, arguments), true_launch=True)
    assert done.returncode != 0
    assert "another rank has ended" in done.stderr
    assert_resume_gives_the_same(arguments, folder, undisturbed("zero2"))


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
    hit = faults.main(["--kills", "4", "--engine", "ddp"])
    assert hit["rank 0"] + hit["rank 1"] + hit["everything"] == 4
    assert hit["runs compared"] >= 1
