"""A run's directory as docs/main_job.md has it, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

NAME = "base_model.model.bert.encoder.layer.{}.{}.dense.aflora.default.{}"
MATRICES = [NAME.format(i, kind, m) for i in (0, 1) for kind in ("intermediate", "output") for m in "AB"]


def write_run(folder: Path, seed: int = 0, accuracy: float = 0.75, seconds: float = 3.0) -> Path:
    """A finished run of 12 updates: two layers, eight matrices."""
    folder.mkdir(parents=True)
    config = {
        "run": {"dir": str(folder)},
        "model": {"name": "tiny"},
        "data": {"task": "rte"},
        "train": {"epochs": 2, "seed": seed},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = [
        {
            "step": step,
            "epoch": (step + 1) / 6,
            "loss": 1 / (step + 1),
            "lr": 1e-2,
            "head_lr": 4e-2,
            "grad_norm": 1.0,
            "trainable_params": 1000 - 50 * step,
            "step_seconds": seconds / 12,
            "samples_per_second": 100.0,
        }
        for step in range(12)
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    events = [
        {"step": 3 + i, "frozen": [name], "scores": dict.fromkeys(MATRICES[i:], 0.1 + i)}
        for i, name in enumerate(MATRICES)
    ]
    write_lines(folder / "freeze_log.jsonl", events)
    result = {
        "task": "rte",
        "metrics": {"accuracy": accuracy},
        "evaluations": [{"accuracy": 0.7}, {"accuracy": accuracy}],
        "engine": "zero2",
        "world_size": 2,
        "steps": 12,
        "train_seconds": seconds,
        "samples_per_second": 64.0,
        "avg_trainable_params": 700.0,
        "lora_r8_trainable_params": 9000,
        "freezable_matrices": 8,
        "freeze_events": 8,
        "freeze_seconds_total": 0.01,
        "traces": [],
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
