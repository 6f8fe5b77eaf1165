"""Pictures of runs say what the files say."""

from __future__ import annotations

from typing import Any

from aflora_dist.figures import curves, freeze_map, score_curves
from aflora_dist.store.records import Event, Update
from aflora_dist.watch.telemetry import Telemetry

NAMES = [f"model.{stack}.layers.{i}.fc1.aflora.default.A" for stack in ("encoder", "decoder") for i in range(2)]


def test_a_dot_ends_the_score_of_what_froze_and_no_other() -> None:
    events = [Event(step, [NAMES[step]], dict.fromkeys(NAMES[step:], 0.1 + step), None) for step in range(2)]
    (axis, _) = score_curves(events, 10, "gradient").axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == 2
    assert len(axis.lines) == 4 + 2
    assert axis.get_ylabel().endswith("(Eq. 4)")


def test_places_in_an_order_are_not_called_scores_of_gradients_and_begin_with_0() -> None:
    events = [Event(step, [NAMES[step]], dict(zip(NAMES[step:], range(step, 4), strict=True)), None) for step in (0, 1)]
    (axis, _) = score_curves(events, 10, "front_to_back").axes
    assert axis.get_yscale() == "linear"
    assert "front_to_back" in axis.get_ylabel()
    assert "Eq. 4" not in axis.get_ylabel()


def test_lora_is_compared_with_on_the_same_side_of_the_head() -> None:
    line: dict[str, Any] = dict.fromkeys(Update.__dataclass_fields__, 1.0) | {"step": 0, "trainable_params": 600}
    trained = curves([Update(**line)], lora_r8=1300, head=500).axes[2]
    levels = {str(drawn.get_label()): drawn.get_ydata()[0] for drawn in trained.lines}  # type: ignore[index]
    assert levels == {"this run": 600, "LoRA r=8 and the head": 1800, "the head": 500}


def test_encoder_and_decoder_are_told_apart() -> None:
    seen: dict[str, float] = {}

    class Watcher:
        survived = OSError

        def scalars(self, values: dict[str, float], step: int) -> None:
            seen.update(values)

    telemetry = Telemetry.__new__(Telemetry)
    telemetry.watchers = [Watcher()]  # type: ignore[list-item]
    telemetry.scores({name: float(i) for i, name in enumerate(NAMES)}, 0)
    assert sorted(seen.values()) == [0.0, 1.0, 2.0, 3.0]
    assert "score encoder layer 00/fc1 A" in seen
    labels = [text.get_text() for text in freeze_map(NAMES, {}, 10).axes[0].get_xticklabels()]
    assert sorted(labels) == ["decoder 0", "decoder 1", "encoder 0", "encoder 1"]
