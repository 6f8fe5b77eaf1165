"""A campaign of kills: a run that freezes and saves all the time is killed at random moments and resumed.

    python -m tests.faults --kills 100

Each kill takes one rank, or all of them, with SIGKILL, a random while after the run has done its first new update.
Checked each time: the job ends within 30 s, no checkpoint is damaged, at most the update since the last save is lost.
Checked at the end of every run: losses, freeze log and weights are those of an undisturbed run, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from aflora_dist.store import checkpoint
from tests.runs import assert_same_to_the_bit, begin_job, lines, options
from tests.small import make_tiny_model, write_reviews

EPOCHS = 12


def main(argv: list[str] | None = None) -> Counter[str]:
    """Run the campaign; returns how often what was hit."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--engine", default="ddp", help="single, ddp, zero1, zero2 or zero3; two ranks but for single")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)
    hit: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        make_tiny_model(home / "model")
        write_reviews(home / "train.csv", 100, seed=0)
        write_reviews(home / "dev.csv", 33, seed=1)
        more = {"train.epochs": EPOCHS, "run.save_every": 1, "run.keep": 3, "freezing.final_epochs": 2}
        undisturbed = home / "undisturbed"
        job = begin_job(args.engine, options(undisturbed, home / "model", home, **more))
        said = job.communicate(timeout=300)
        assert job.returncode == 0, said
        while sum(hit[what] for what in ("rank 0", "rank 1", "everything")) < args.kills:
            folder = home / "run"
            command = [*options(folder, home / "model", home, **more), "--resume"]
            while not (folder / "result.json").exists():
                strike(args.engine, command, folder, chance, hit, args.kills)
            assert_same_to_the_bit(folder, undisturbed)
            hit["runs compared"] += 1
            shutil.rmtree(folder)
    print(f"{dict(hit)} in {time.monotonic() - began:.0f} s")
    return hit


def strike(engine: str, command: list[str], folder: Path, chance: random.Random, hit: Counter[str], kills: int) -> None:
    """Start or resume the run, and kill it unless it ends before (or enough has been killed)."""
    job = begin_job(engine, command)
    first = saved(folder)
    enough = sum(hit[what] for what in ("rank 0", "rank 1", "everything")) >= kills
    while job.poll() is None and (saved(folder) <= first or enough):
        time.sleep(0.005)
    end = time.monotonic() + chance.uniform(0, 1.0)
    while job.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    if job.poll() is not None:
        said = job.communicate()
        assert job.returncode == 0, said
        return
    victim = chance.choice(["rank 0", "rank 1", "everything"] if len(job.pids) > 1 else ["everything"])
    if victim == "everything":
        job.kill()
    else:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            job.send_signal(signal.SIGKILL, int(victim[-1]))
    try:
        job.wait(timeout=30)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the job went on for 30 s after {victim} was killed") from None
    if (folder / "result.json").exists():
        return
    hit[victim] += 1
    found, complaints = checkpoint.newest_good(folder / "checkpoints")
    assert not complaints, complaints
    assert found is not None
    done = lines_of(folder)
    hit["before its save"] += done > found.training["progress"]["step"]
    assert done <= found.training["progress"]["step"] + 1, "more than the work since the last save was lost"


def saved(folder: Path) -> int:
    paths = checkpoint.list_checkpoints(folder / "checkpoints")
    return int(paths[0].name.removeprefix("step_")) if paths else 0


def lines_of(folder: Path) -> int:
    """Updates that metrics.jsonl tells of; a killed process may leave half a line."""
    try:
        return len(lines(folder, "metrics.jsonl"))
    except json.JSONDecodeError:
        return len((folder / "metrics.jsonl").read_text().splitlines()) - 1


if __name__ == "__main__":
    main()
