"""Several runs one after the other in the same processes, for starting Python takes longer than a small run.

    accelerate launch ... tests/workers/series.py '[["MODULE", "ARGUMENT", ...], ...]'

Calls MODULE.main([ARGUMENT, ...]) for each; accelerate's state begins anew each time, the process group lives on.
The first that fails ends all. A line after each tells rank 0's output apart.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys

from accelerate.state import AcceleratorState, GradientState, PartialState

END = "=== end of a run ==="


def main() -> int:
    PartialState.destroy_process_group = lambda self, group=None: None  # Accelerator.end_training would
    for module, *arguments in json.loads(sys.argv[1]):
        status = importlib.import_module(module).main(arguments)
        if status:
            return status
        AcceleratorState._reset_state()
        GradientState._reset_state()
        gc.collect()
        if os.environ.get("RANK", "0") == "0":
            print(END, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
