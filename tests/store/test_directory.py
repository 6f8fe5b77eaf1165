"""One directory, one run: who comes second looks first, what is stale does nothing, what is put aside goes in time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from aflora_dist import AFLoRAError
from aflora_dist.cli import run as aflora
from aflora_dist.options import RunConfig
from aflora_dist.store import checkpoint
from aflora_dist.store.rundir import GoingOn, RunDirectory, refuse_own_input
from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main
from tests.runs import lines, options


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("how", ["fresh", "overwriting", "going on"])
def test_a_job_that_was_started_before_another_one_began_here_leaves_that_one_s_result(
    how: str, arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    begun = None if how == "fresh" else main([*arguments, "--train.epochs", "1", "--freezing.initial_epochs", "0"])
    config = RunConfig(dir=str(folder), overwrite=how == "overwriting", resume="last" if how == "going on" else None)
    slow = RunDirectory(config, Accelerator(cpu=True))  # it has looked, and loads its model now
    more = {"fresh": [], "overwriting": ["--run.overwrite", "true"], "going on": ["--run.overwrite", "true"]}[how]
    assert begun in (None, 0)
    assert main([*arguments, *more]) == 0
    kept = files(folder)
    with pytest.raises(AFLoRAError, match=f"Another job has begun or ended a run in {folder} since"):
        slow.claim("{}", going_on=GoingOn(folder / "checkpoints" / "step_6", 6, []) if how == "going on" else None)
    assert files(folder) == kept


def test_a_stop_file_of_before_the_start_stops_nothing_and_one_of_the_loading_does(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()
    assert main(arguments) == 0
    assert f"{folder / 'stop'} was there before this start" in capsys.readouterr().out
    assert (folder / "result.json").exists()
    assert not (folder / "stop").exists()
    original = RunDirectory.claim

    def claim(self: RunDirectory, *args: Any, **options: Any) -> None:
        self.stop_file.touch()
        original(self, *args, **options)

    monkeypatch.setattr(RunDirectory, "claim", claim)
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    assert "Stopped as asked, after step 0" in capsys.readouterr().out
    assert not (folder / "result.json").exists()


def test_a_stop_that_a_job_was_sent_before_python_had_started_counts(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """launch/slurm/job.sh removes the file of before, and says so."""
    monkeypatch.setenv("AFLORA_STOP_CLEARED", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert main(arguments) == 0
    assert "Stopped as asked, after step 0" in capsys.readouterr().out


def test_what_is_put_aside_goes_with_the_next_branch_and_with_the_run(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews)  # checkpoints after 5, 10, 15 and 20 updates

    def aside() -> list[str]:
        return sorted(path.name for path in (folder / "checkpoints").glob("abandoned_*"))

    assert main(arguments) == 0
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    for branch, left in ((10, [15, 20]), (15, [20]), (5, [10, 15, 20])):
        assert main([*arguments, "--resume", str(folder / "checkpoints" / f"step_{branch:08d}")]) == 0
        assert aside() == [f"abandoned_step_{step:08d}" for step in left]
    assert (folder / "abandoned_adapter").is_dir()
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    assert not list(folder.rglob("abandoned_*"))


def test_checkpoints_hold_no_scores_and_the_log_of_a_run_that_goes_on_has_all(
    tiny_model: Path, reviews: Path, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved" / "step_00000015"
    assert main(options(whole, tiny_model, reviews)) == 0
    log = [{**event, "rebuild_seconds": 0} for event in lines(whole, "freeze_log.jsonl")]
    saved = whole / "checkpoints" / "step_00000015"
    training = json.loads((saved / "training.json").read_text())
    events = training["progress"]["parts"]["freezing"]["events"]
    assert len(events) > 2
    assert all(event["scores"] == {} for event in events)
    shutil.copytree(saved, moved)

    def gone_on(name: str, source: Path) -> list[dict[str, Any]]:
        assert main([*options(tmp_path / name, tiny_model, reviews), "--resume", str(source)]) == 0
        return [{**event, "rebuild_seconds": 0} for event in lines(tmp_path / name, "freeze_log.jsonl")]

    assert gone_on("beside its log", saved) == log
    alone = gone_on("alone", moved)
    assert [{**event, "scores": {}} for event in alone] == [{**event, "scores": {}} for event in log]
    assert alone[len(events) :] == log[len(events) :]


def test_a_run_does_not_delete_what_it_begins_from(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [*arguments, "--method.name", "full", "--freezing.enabled", "true"]
    assert main(whole) == 0
    trained = files(tmp_path / "run")
    again = [*whole, "--model.name", str(tmp_path / "run" / "adapter"), "--run.overwrite", "true"]
    for command in ("train", "plan"):
        assert aflora([command, *again]) == 2
        assert f"run.overwrite=true would delete {tmp_path / 'run' / 'adapter'}, which" in capsys.readouterr().err
    assert files(tmp_path / "run") == trained
    (tmp_path / "link").symlink_to(tmp_path / "run" / "adapter")
    told = {"model.name": tmp_path / "link", "data.mix": f'{{"{tmp_path}/run/adapter:main": 1}}'}
    for option, value in told.items():
        config, _ = parse([*whole, "--run.overwrite", "true", f"--{option}", str(value)])
        with pytest.raises(AFLoRAError, match=r"run\.overwrite=true would delete"):
            refuse_own_input(config)
    shutil.rmtree(tmp_path / "run" / "lora", ignore_errors=True)
    (tmp_path / "run" / "lora").symlink_to(tmp_path)  # which the run would only let go
    refuse_own_input(parse([*whole, "--run.overwrite", "true", "--model.name", str(tmp_path)])[0])


def test_options_that_a_person_wrote_are_not_deleted(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    mine = folder / "config.yaml"
    mine.write_text(f"run:\n  dir: {folder}\n  overwrite: true\ntrain:\n  epochs: 1  # for now\n")
    begin = [str(mine), *arguments[2:], "--freezing.initial_epochs", "0"]
    for more in ([], ["--run.overwrite", "false"], ["--run.overwrite", "false", "--resume"]):
        assert main([*begin, *more]) == 2
        said = capsys.readouterr().err
        assert f"{mine} is there, and no run has written it" in said
        assert "Put yours elsewhere" in said
        assert "replace it" not in said
    assert list(folder.iterdir()) == [mine]

    elsewhere = mine.rename(tmp_path / "mine.yaml")
    (folder / "checkpoints").mkdir()  # an empty folder is no run
    assert main([str(elsewhere), *begin[1:], "--run.overwrite", "false"]) == 0
    (folder / "trackers").mkdir()
    within = elsewhere.rename(folder / "trackers" / "mine.yaml")
    assert main([str(within), *begin[1:]]) == 2
    assert f"run.overwrite=true would delete {within}, which this run reads" in capsys.readouterr().err
    within.unlink()
    assert main([str(mine), "--run.overwrite", "true"]) == 0  # which the run itself has written


def test_what_a_run_leaves_behind_asks_for_no_other_one_s_end(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    kept = files(tmp_path / "run")
    assert main([str(tmp_path / "run" / "config.yaml")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert files(tmp_path / "run") == kept


def test_folders_that_are_links_stay_where_they_are_empty_or_of_checkpoints(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "adapter", "lora", "tensorboard"):
        (tmp_path / "scratch" / name).mkdir(parents=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "scratch" / name)
    assert main(arguments) == 0
    (tmp_path / "scratch" / "checkpoints" / "mine").touch()
    saved = sorted(path.name for path in (tmp_path / "scratch" / "checkpoints").iterdir())
    for name in ("adapter", "lora"):
        assert (tmp_path / "scratch" / name / "adapter_config.json").exists()
    kept = files(tmp_path / "scratch" / "adapter")
    (tmp_path / "scratch" / "checkpoints" / "step_00000099").mkdir()
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    assert sorted(path.name for path in (tmp_path / "scratch" / "checkpoints").iterdir()) == saved
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    assert not (tmp_path / "run" / "adapter").is_symlink()  # the run's part of what it led to is not known
    assert files(tmp_path / "scratch" / "adapter") == kept


def test_a_damaged_line_takes_no_other_with_it(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0
    run = tmp_path / "run"
    expected = lines(run, "metrics.jsonl")
    written = (run / "metrics.jsonl").read_text().splitlines()
    written[2] = written[2][:17]
    (run / "metrics.jsonl").write_text("\n".join(written) + "\n")
    newest = max((run / "checkpoints").glob("step_*"))
    assert main([*arguments, "--resume", str(newest)]) == 0
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == [
        line["step"] for number, line in enumerate(expected) if number != 2
    ]


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    wrong = [*arguments, "--model.name", "no/such-model", "--run.dir", str(tmp_path / "file" / "run")]
    assert main(wrong) == 2
    assert f"{tmp_path / 'file'} is no folder that may be written to" in capsys.readouterr().err


def test_a_run_is_no_checkpoint(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    more = ["--run.dir", str(tmp_path / "other"), "--train.epochs", "9", "--resume", str(tmp_path / "run")]
    assert main([*arguments, *more]) == 2
    assert "is a run. --run.dir" in capsys.readouterr().err


def test_what_took_a_training_is_not_deleted_by_resume(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume` stands in every job that may be requeued: where there is nothing to go on from it is no overwrite."""
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews)  # checkpoints after 5, 10, 15 and 20 updates
    saved = folder / "checkpoints"

    def refused(*named: str) -> None:
        kept = files(folder)
        assert main([*arguments, "--resume"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert all(name in said for name in (*named, "run.overwrite=true")), said
        assert files(folder) == kept

    def away(path: Path) -> None:
        raise OSError(116, "Stale file handle", str(path))

    for name in ("checkpoints/checkpoint-500/model.bin", "adapter/adapter_model.safetensors", "trackers/theirs"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("another program's")
    refused("adapter", "trackers", "checkpoints/checkpoint-500")
    shutil.rmtree(folder)

    assert main(arguments) == 0
    (folder / "result.json").unlink()
    with monkeypatch.context() as patched:  # a server that is away for a moment
        patched.setattr(checkpoint, "_fingerprint", away)
        refused("Stale", "step_00000020")
    saved.joinpath("step_00000005").rename(saved / "good")
    for path in saved.glob("step_*"):
        (path / "manifest.json").write_text("{")
    refused("manifest.json", "checkpoints/good", "checkpoints/step_00000010")
    assert main([*arguments, "--run.overwrite", "true"]) == 0
    assert sorted(path.name for path in saved.iterdir()) == ["good", *(f"step_000000{n:02}" for n in (5, 10, 15, 20))]


def test_a_checkpoint_of_another_branch_outlives_going_on_from_it(
    tiny_model: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = options(folder, tiny_model, reviews)
    saved = folder / "checkpoints"
    assert main(arguments) == 0
    (saved / "step_00000015").rename(saved / "abandoned_step_00000015")
    shutil.copytree(saved / "step_00000010", saved / "abandoned_step_00000010")
    assert main([*arguments, "--resume", str(saved / "abandoned_step_00000015")]) == 0
    left = sorted(path.name for path in saved.glob("abandoned_*"))
    assert left == ["abandoned_step_00000015", "abandoned_step_00000020"]
    # Of the two after 15 updates --resume would take the other one, were this one stopped before it has saved.
    before = files(folder)
    shutil.copytree(saved / "abandoned_step_00000015", saved / "step_00000015")
    manifest = saved / "step_00000015" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # of another branch
    assert main([*arguments, "--resume", str(saved / "abandoned_step_00000015")]) == 2
    assert "step_00000015 is of another branch of this run than" in capsys.readouterr().err
    manifest.unlink()  # then it is none, and the run goes on
    assert aflora(["train", *arguments, "--resume", str(saved / "abandoned_step_00000015"), "--dry_run"]) == 0
    shutil.rmtree(saved / "step_00000015")
    assert files(folder) == before


def test_what_serves_is_made_of_the_adapter_that_a_run_ends_with(arguments: list[str], tmp_path: Path) -> None:
    """Where its damaged result was deleted, as a message advises, it goes on; so the older lora/ is none of its."""
    run = tmp_path / "run"
    assert main(arguments) == 0
    served = run / "lora" / "adapter_model.safetensors"
    expected = served.read_bytes()
    (run / "result.json").unlink()
    served.write_bytes(b"of before")
    assert main([*arguments, "--resume"]) == 0
    assert served.read_bytes() == expected


@pytest.mark.parametrize("lines_first", [3, 12])
def test_a_job_whose_folder_was_moved_away_writes_nothing_into_another_one_s_of_that_name(
    lines_first: int,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, append, written = tmp_path / "run", RunDirectory.append, iter(range(100))

    def moved_after(self: RunDirectory, name: str, line: dict[str, Any]) -> None:
        append(self, name, line)
        if name == "metrics.jsonl" and next(written) + 1 == lines_first:
            folder.rename(tmp_path / "moved")
            folder.mkdir()
            (folder / ".lock").write_text("process 7 on another\n")

    monkeypatch.setattr(RunDirectory, "append", moved_after)
    assert main([*arguments, "--run.save_every", "0", "--run.trackers", "[]"]) == 2
    assert "another job has begun there: process 7 on another" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert len(lines(tmp_path / "moved", "metrics.jsonl")) == lines_first
