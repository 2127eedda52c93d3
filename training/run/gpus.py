"""GPUs by their data sheets; what a plan and a model card know of them."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU by its data sheet.

    Attributes:
        name: name as its maker writes it.
        chip: part of it that the driver's name contains, too.
        bf16_tflops: peak of dense bf16 matrix products with fp32 sums, 1e12 FLOP/s.
        memory_gib: memory as sold; drivers show up to 7 % less.
        watts: the most that the board may draw.
    """

    name: str
    chip: str
    bf16_tflops: float
    memory_gib: float
    watts: int


# NVIDIA's data sheets. Where a sheet gives the rate "with sparsity" (H100 and H200: 1,979; L40S: 733), half of it.
GPUS = (
    Gpu("A100 40GB", "A100", 312, 40, 400),
    Gpu("A100 80GB", "A100", 312, 80, 400),
    Gpu("H100 SXM", "H100", 989, 80, 700),
    Gpu("H200", "H200", 989, 141, 700),
    Gpu("L40S", "L40S", 362, 48, 350),
    Gpu("RTX 4090", "RTX 4090", 165, 24, 450),
)


def gpu_watts(device: str) -> int | None:
    """Look up the watts of a card by the driver's name, as "NVIDIA H100 80GB HBM3"; None for one that is not listed."""
    return next((gpu.watts for gpu in GPUS if gpu.chip in device), None)
