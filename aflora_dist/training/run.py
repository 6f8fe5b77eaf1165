"""Entry point of the main job: `accelerate launch -m aflora_dist.training.run [CONFIG.yaml] [--key value ...]`."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from ..errors import AFLoRAError

_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Application timeout caused pair closure",
)


def quiet_libraries() -> None:
    """Leave warnings and errors; drop the libraries' progress reports."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
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
    except RuntimeError as error:  # what gloo and NCCL say when the other end of a collective is gone
        if not any(sign in str(error) for sign in _LOST_RANK):
            raise
        if speaks:
            print(
                "aflora: error: another rank has ended in the middle of the training; what it printed tells why. "
                "The same command with --resume goes on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        return 3
    if is_first and result is not None:
        from ..view.report import print_summary

        print_summary(result, config.run.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
