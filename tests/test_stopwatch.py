"""Freezing's seconds are its own: a GPU that works behind the host is pretended, and its clock with it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aflora_dist.control import stopwatch
from aflora_dist.control.stopwatch import Stopwatch
from tests.loop import Loop

GPU = torch.device("cuda")


class Pretended:
    """A host whose time goes on only when told, and a GPU that does one thing after the other."""

    def __init__(self) -> None:
        self.now = self.done = 0.0

    def queue(self, seconds: float) -> None:
        self.done = max(self.now, self.done) + seconds

    def synchronize(self, device: Any = None) -> None:
        self.now = max(self.now, self.done)

    def event(self, device: Any, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.now, self.done))
        event.query = lambda: event.at <= self.now
        event.elapsed_time = lambda other: (other.at - event.at) * 1e3
        return event


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    gpu = Pretended()
    monkeypatch.setattr(torch, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)
    return gpu


def test_a_decision_does_not_count_the_backward_pass_that_it_waits_for(pretended: Pretended) -> None:
    watch = Stopwatch()
    pretended.queue(10.0)
    start = watch.start(GPU)
    pretended.now += 1.0  # the host decides
    pretended.queue(2.0)  # and queues the drop
    assert watch.stop(start, GPU) == 3.0
    assert watch.seconds == 3.0


def test_observing_counts_what_the_gpu_does_and_waits_for_nothing(pretended: Pretended) -> None:
    watch = Stopwatch()
    for _ in range(3):
        pretended.queue(10.0)
        with watch.queueing(GPU):
            pretended.now += 0.001  # launching
            pretended.queue(0.5)
    assert pretended.now == pytest.approx(0.003)
    assert watch.seconds == 0.0
    pretended.now = 22.0  # the third is not done
    assert watch.seconds == 1.0
    pretended.synchronize()
    assert watch.seconds == 1.5
    watch.seconds = 7.0  # as a resumed run sets it
    assert watch.seconds == 7.0


def test_what_is_observed_on_the_cpu_counts_as_long_as_it_takes(pretended: Pretended) -> None:
    """Under optimizer offload gradients lie there."""
    watch = Stopwatch()
    with watch.queueing(torch.device("cpu")):
        pretended.now += 2.0
    assert watch.seconds == 2.0


def test_the_clock_starts_after_the_update_and_stops_after_the_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    loop.train(0, 2)
    order: list[str] = []

    def told(owner: Any, name: str, said: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any) -> Any:
            order.append(said)
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    told(stopwatch, "_synchronize", "waited")
    told(loop.freezing, "scores", "scores")
    told(loop.freezing.engine, "drop", "drop")
    loop.train(2, 12)
    events = len(loop.freezing.events)
    assert events > 2
    assert order == ["waited", "scores", "drop", "waited"] * events
