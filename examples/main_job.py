"""`aflora train` from Python: a configuration in, a run's directory out.

    python examples/main_job.py
    python examples/main_job.py --train.epochs 1 --method.name lora      # anything of `aflora train --help`

Without Python: `aflora train examples/reviews.yaml`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aflora_dist.training.command_line import parse
from aflora_dist.training.run import main as train

CONFIG = Path(__file__).resolve().parent / "reviews.yaml"


def main(arguments: list[str]) -> int:
    """Train, and read what is left behind; the exit status is `aflora train`'s."""
    arguments = [str(CONFIG), *arguments]
    status = train(arguments)
    if status != 0:
        return status
    run = Path(parse(arguments)[0].run.dir)
    result = json.loads((run / "result.json").read_text())
    print(f"{result['metrics']}, {result['avg_trainable_params']:,.0f} parameters trained on average")
    log = run / "freeze_log.jsonl"  # AFLoRA's alone
    for line in log.read_text().splitlines() if log.exists() else []:
        event = json.loads(line)
        print(f"after step {event['step']}: {', '.join(event['frozen'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
