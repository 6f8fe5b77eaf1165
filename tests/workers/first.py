"""Each node's first process goes first; prints what each rank got where one fails, and who had tried by then."""

from __future__ import annotations

import tempfile
from pathlib import Path

from accelerate.utils import broadcast_object_list

from aflora_dist import AFLoRAError
from aflora_dist.processes import first_on_node, launched_accelerator

accelerator = launched_accelerator()
rank = accelerator.process_index
for how, failing in (("failing", None), ("failing", 0), ("failing", 1), ("refusing", 0)):
    (folder,) = broadcast_object_list([tempfile.mkdtemp() if rank == 0 else None])

    def action(how: str = how, failing: int | None = failing, folder: str = folder) -> str:
        if rank == 1:
            assert (Path(folder) / "0").exists(), "the first process had its turn"
        (Path(folder) / str(rank)).touch()
        if rank == failing:
            raise AFLoRAError("what is wrong") if how == "refusing" else ZeroDivisionError("an oversight")
        return "fine"

    try:
        said = first_on_node(action)
    except (AFLoRAError, ZeroDivisionError) as error:
        said = f"{type(error).__name__}: {error}"
    tried = " ".join(sorted(path.name for path in Path(folder).iterdir()))
    print(f"rank {rank}, {how} {failing}: {said}, tried by {tried}\n", end="", flush=True)
accelerator.end_training()
