"""Has a release changed behaviour in silence? The same short trainings in several environments, side by side.

    python -m tests.versions .venv/bin/python .venv-oldest/bin/python .venv-latest/bin/python

prints the versions, what froze when, and the largest relative difference of losses and of scores from the first
environment's; it exits with 1 where another order froze, or a difference is above 1e-3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "trl")
TOLERANCE = 1e-3
Training = dict[str, Any]  # losses: one for each update; events: [step, names that froze, all scores]


def own_loop() -> Training:
    """A classifier in a loop as accelerate's documentation writes it."""
    from tests.loop import Loop
    from tests.workers.tiny import global_batch

    loop, losses = Loop(), []
    for step in range(loop.freezing.config.total_steps):
        losses.append(loop.model(**global_batch(step)).loss.item())
        loop.step(step, clip=0.1)
    return {"losses": losses, "events": told(loop.freezing.events)}


def trainer() -> Training:
    """A language model under transformers' Trainer."""
    from aflora_dist import FreezingCallback
    from tests.test_trainer import make

    with TemporaryDirectory() as folder:
        trained = make(Path(folder), callback := FreezingCallback())
        trained.train()
    assert callback.freezing is not None
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    return {"losses": losses, "events": told(callback.freezing.events)}


def told(events: list[Any]) -> list[Any]:
    return [[e.step, sorted(e.frozen), {name: float(score) for name, score in e.scores.items()}] for e in events]


TRAININGS = {"own loop, classifier": own_loop, "Trainer, language model": trainer}


def run_all() -> dict[str, Any]:
    """Every training, and the versions that it ran with: what one environment's process prints."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"versions": versions, "trainings": {name: train() for name, train in TRAININGS.items()}}


def differences(first: Training, other: Training) -> tuple[str, float, float]:
    """(what froze differently, or "", largest relative difference of a loss, and of a score)"""
    events = list(zip_longest(first["events"], other["events"], fillvalue=[None, [], {}]))
    apart = next((pair for pair in events if pair[0][:2] != pair[1][:2]), None)
    froze = " but ".join(f"{', '.join(names) or 'nothing'} at {step}" for step, names, _ in apart) if apart else ""
    losses = largest(zip(first["losses"], other["losses"], strict=True))
    scores = largest((mine[2][n], theirs[2].get(n, 0.0)) for mine, theirs in events for n in mine[2])
    return froze, losses, scores


def largest(pairs: Iterable[tuple[float, float]]) -> float:
    return max((abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs), default=0.0)


def compare(found: list[dict[str, Any]]) -> bool:
    """Print a Markdown table; whether all are the same."""
    print("| | " + " | ".join(LIBRARIES) + " | training | froze | losses | scores |")
    print("|---|" + "---|" * (len(LIBRARIES) + 4))
    first, same = found[0], True
    for number, each in enumerate(found):
        head = f"| {number + 1} | " + " | ".join(each["versions"][name] for name in LIBRARIES)
        for name, training in each["trainings"].items():
            froze, losses, scores = differences(first["trainings"][name], training)
            same = same and not froze and max(losses, scores) <= TOLERANCE
            print(f"{head} | {name} | {froze or 'the same'} | {losses:.1e} | {scores:.1e} |")
    return same


def main(pythons: list[str]) -> int:
    found = []
    for python in pythons:
        command = [python, "-W", "ignore", "-m", "tests.versions"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return 0 if compare(found) else 1


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(main(sys.argv[1:]))
    print(json.dumps(run_all()))
