"""Compiles what DeepSpeed would compile in the first ranks that use it, before workers start such ranks side by side.

    python -m tests.operators

Ranks of two workers would wait for each other's compilers, some of them longer than a test may take.
"""

from __future__ import annotations

from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder


def main() -> None:
    for builder in (ShareMemCommBuilder, CPUAdamBuilder):
        builder().load(verbose=False)


if __name__ == "__main__":
    main()
