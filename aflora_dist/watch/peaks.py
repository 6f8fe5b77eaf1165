"""What GPUs can compute at most, for the share of it that a training reaches. Dense: without structured sparsity."""

from __future__ import annotations

import re

# TFLOP/s of the data sheets, boost clock. Where a sheet gives tensor-core figures "with sparsity", half of them; on
# GeForce cards those with float32 accumulation, which is what training uses. First match counts.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA H200 Tensor Core GPU datasheet (SXM; NVL)
    (r"H200 NVL\b", {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"H200\b", {"fp32": 67, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5}),
    # NVIDIA H100 Tensor Core GPU datasheet (SXM; PCIe; NVL)
    (r"H100 PCIe\b", {"fp32": 51, "tf32": 378, "bf16": 756.5, "fp16": 756.5}),
    (r"H100 NVL\b", {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"H100 (80GB )?(HBM3|SXM\w*)\b", {"fp32": 67, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5}),
    # NVIDIA A100 Tensor Core GPU datasheet
    (r"A100\b", {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}),
    # NVIDIA L40S and L4 Tensor Core GPU datasheets
    (r"L40S\b", {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362}),
    (r"L4\b", {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121}),
    # NVIDIA A10 Tensor Core GPU datasheet (the A10G of clouds is another chip)
    (r"A10\b", {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125}),
    # NVIDIA T4 Tensor Core GPU datasheet: neither TF32 nor bfloat16
    (r"\bT4\b", {"fp32": 8.1, "fp16": 65}),
    # NVIDIA V100 Tensor Core GPU datasheet (SXM2; PCIe)
    (r"V100-SXM", {"fp32": 15.7, "fp16": 125}),
    (r"V100-PCIE", {"fp32": 14, "fp16": 112}),
    # NVIDIA Ada and Ampere GA102 GPU architecture whitepapers
    (r"RTX 4090$", {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}),
    (r"RTX 3090$", {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71}),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of a device at most, or None where it is not known.

    Args:
        device_name: As torch.cuda.get_device_name() says.
        dtype: fp32, tf32, bf16 or fp16: what matrix products multiply.
    """
    if " MIG " in device_name:  # a slice of the chip: how much of it computes is not said
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device_name):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None
