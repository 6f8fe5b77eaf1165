"""Entry point of the main job: `accelerate launch -m aflora_dist.training.run [CONFIG.yaml] [--key value ...]`."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from ..errors import AFLoRAError


def quiet_libraries() -> None:
    """Leave warnings and errors; drop the libraries' progress reports."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "deepspeed", "accelerate", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """Run the main job; returns the exit status. What a user did wrong is said in a line or two."""
    quiet_libraries()
    is_first = int(os.environ.get("RANK", "0")) == 0
    speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0  # once per node: its files may differ
    try:
        from .config import parse

        config, resolved = parse(sys.argv[1:] if arguments is None else arguments)
        from .loop import train  # after parsing: a wrong option should not take seconds to find

        quiet_libraries()  # DeepSpeed sets its own level on import
        result = train(config, resolved)
    except AFLoRAError as error:
        if speaks:
            print(f"aflora: error: {error}", file=sys.stderr, flush=True)
        return 2
    if is_first:
        from .report import print_summary

        print_summary(result, config.run.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
