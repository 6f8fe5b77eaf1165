"""The device of these tests: a GPU, or, to try the tests themselves, the CPU with AFLORA_GPU_TESTS_ON_CPU=1."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("AFLORA_GPU_TESTS_ON_CPU") == "1":
        return "cpu"
    pytest.skip("needs a CUDA device, or AFLORA_GPU_TESTS_ON_CPU=1 to try the test itself")
