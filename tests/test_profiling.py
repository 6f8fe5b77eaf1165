"""The profiling tools on small models: what they count is right; how long things take is not tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from profiling.compare import main as compare
from profiling.compare import over_freeze_log
from profiling.overhead import main as overhead

SMALL = ["--layers", "1", "--batch", "2", "--length", "16", "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("compare")
    done = compare([*SMALL, "--model", "bert-base", "--methods", "full", "adalora", "ia3", "--out", str(out)])
    assert json.loads((out / "compare.json").read_text()) == done
    for name in ("compare.md", "compare.png", "tensorboard"):
        assert (out / name).exists()
    return done["methods"]


def test_the_contract_of_compare_json(report: dict[str, Any]) -> None:
    methods = {"floor", "full", "lora", "adalora", "elora", "aflora_training", "aflora_half", "aflora_frozen", "aflora"}
    assert methods | {"ia3"} == set(report)
    keys = {"step_seconds_median", "flops", "trainable_params", "saved_bytes", "peak_memory_bytes"}
    keys |= {"optimizer_state_bytes", "ratio_to_elora", "ratio_to_lora", "ratio_to_floor"}
    assert all(keys <= set(numbers) for numbers in report.values())
    assert report["lora"]["ratio_to_lora"] == 1.0


def test_parameters_and_flops_follow_the_closed_formulas(report: dict[str, Any]) -> None:
    sizes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    vectors = sum(4 + out for _, out in sizes)
    matrices = sum(4 * (i + o) for i, o in sizes[4:])
    assert report["floor"]["trainable_params"] == 0
    assert report["lora"]["trainable_params"] == sum(8 * (i + o) for i, o in sizes)
    assert report["elora"]["trainable_params"] == sum(1024 + o for _, o in sizes)
    assert report["aflora_training"]["trainable_params"] == vectors + matrices
    assert report["aflora_half"]["trainable_params"] == vectors + matrices / 2
    assert report["aflora_frozen"]["trainable_params"] == vectors
    assert report["aflora_frozen"]["optimizer_state_bytes"] == 8 * vectors
    tokens = 2 * 16
    forward_and_backward = sum(2 * 2 * tokens * i * o for i, o in sizes)
    assert report["floor"]["linear_flops"] == forward_and_backward
    # Eq. 1: A x, B h and their way back, M; the products for s_d (matrix times vector is not counted)
    path = sum(2 * tokens * 4 * (2 * i + 3 * o) + 2 * 4 * o for i, o in sizes)
    assert report["aflora_frozen"]["linear_flops"] == forward_and_backward + path


def test_the_adapter_keeps_less_for_backward_than_lora(report: dict[str, Any]) -> None:
    floor, lora = report["floor"]["saved_bytes"], report["lora"]["saved_bytes"]
    assert report["aflora_training"]["saved_bytes"] < lora
    assert report["aflora_frozen"]["saved_bytes"] - floor < 2 / 3 * (lora - floor)


def test_the_paper_s_shape_has_the_paper_s_flops_ratio(tmp_path: Path) -> None:
    methods = compare(
        [*SMALL, "--model", "deberta-v3-base", "--length", "64", "--methods", "lora", "--out", str(tmp_path)]
    )["methods"]
    assert 2.9 < methods["elora"]["linear_flops"] / methods["aflora"]["linear_flops"] < 3.0


def test_an_unknown_method_or_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no method 'magic'"):
        compare([*SMALL, "--model", "bert-base", "--methods", "magic", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="neither one of"):
        compare(["--model", "no/such-model", "--out", str(tmp_path)])


def test_parameters_are_averaged_over_a_freeze_log(tmp_path: Path) -> None:
    lines = [{"step": 1, "trainable_params": 70}, {"step": 3, "trainable_params": 40}]
    (tmp_path / "freeze_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert over_freeze_log(tmp_path / "freeze_log.jsonl", 100, 6) == (100 + 100 + 70 + 70 + 40 + 40) / 6
    (tmp_path / "result.json").write_text(json.dumps({"head_params": 10}))
    assert over_freeze_log(tmp_path / "freeze_log.jsonl", 100, 6) == (100 + 100 + 60 + 60 + 30 + 30) / 6


@pytest.mark.distributed
def test_overhead_is_measured_on_two_ranks(tmp_path: Path) -> None:
    small = ["--matrices", "24", "--steps", "2", "--rebuilds", "1"]
    (row,) = overhead(["--engines", "ddp", "--ranks", "2", *small, "--out", str(tmp_path)])
    assert (row["engine"], row["ranks"], row["matrices"]) == ("ddp", 2, 24)
    assert row["decision_bytes"] == 8 * (24 + 2)  # a score per matrix, and the two numbers that must agree
    assert (tmp_path / "overhead.md").exists()
    assert (tmp_path / "overhead.png").exists()
