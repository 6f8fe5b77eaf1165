"""The main job, of which every rank writes what it held at each freeze: OUT/rank<N>.json.

    tests.workers.measured OUT ARGUMENT ...

A line is {"moments", "scores", "after"}: bytes of optimizer state and of scores before the freeze, and of optimizer
state after it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aflora_dist.control import AdaptiveFreezing
from aflora_dist.methods import base
from aflora_dist.training import run

_seen: list[dict[str, int]] = []


class Measured(AdaptiveFreezing):
    def _drop(self, *args: Any) -> None:
        tensors = [t for score in self._scores.shards for t in (*score.averages.values(), score._importance)]
        line = {"moments": self.engine.moment_bytes(), "scores": sum(t.nbytes for t in tensors)}
        super()._drop(*args)
        _seen.append(line | {"after": self.engine.moment_bytes()})


def main(arguments: list[str]) -> int:
    out, *rest = arguments
    _seen.clear()
    base.AdaptiveFreezing = Measured  # type: ignore[misc]
    try:
        return run.main(rest)
    finally:
        base.AdaptiveFreezing = AdaptiveFreezing  # type: ignore[misc]
        (Path(out) / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(_seen))
