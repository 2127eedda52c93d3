"""What the machine has: cores, devices, fast precisions. torch is imported inside: decoding children do without."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

MAX_WORKERS = 16  # processes that decode
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
AUTOCAST = {"fp32": None, "bf16": "bfloat16", "fp16": "float16", "int8": None}  # precision -> torch's dtype


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Processes that decode, where nothing else is asked for: one a usable core, MAX_WORKERS at most."""
    return min(usable_cores(), MAX_WORKERS)


def resolve_device(device: str) -> torch.device:
    """ "auto" is a GPU when there is one, else Apple's, else the CPU.

    Raises:
        UsageError: a device this machine, or this build of torch, does not have.
    """
    import torch

    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return target


def bf16_is_fast(device: torch.device) -> bool:
    """The device multiplies bf16 matrices faster than float32 ones: Ampere and later, AVX-512 BF16, AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private to torch, so asked for with care
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def resolve_precision(precision: Precision, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype, None for float32, and its name.

    Raises:
        UsageError: a precision that does not exist.
    """
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    if precision not in AUTOCAST:
        raise UsageError(f"unknown precision {precision!r}. Valid: auto, {', '.join(AUTOCAST)}.")
    if precision == "int8":
        raise UsageError(
            "int8 is a precision of ONNX files: export one with `micl-zoo export … --precision int8`, and give it as "
            "weights"
        )
    return autocast_dtype(precision), precision


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What `torch.autocast` takes for a precision; None: it is off."""
    import torch

    name = AUTOCAST[precision]
    return None if name is None else getattr(torch, name)
