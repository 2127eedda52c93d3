"""What can compute here: cores and devices, and the one table of precisions and of backends.

torch is imported inside the functions, because the processes that decode images do without it.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import UsageError, unknown

if TYPE_CHECKING:
    import torch

    Device = str | torch.device
else:
    Device = Any  # `resolve_device` says what is none

MAX_WORKERS = 16  # processes that decode
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Backend = Literal["torch", "openvino", "onnx"]


@dataclass(frozen=True)
class PrecisionRow:
    """Where a precision of the arithmetic can be had."""

    dtype: str | None = None  # torch's name of it; None: torch does not compute in it
    openvino: str | None = None  # OpenVINO's name of it; None: OpenVINO does not compute in it
    exported: bool = False  # `micl-zoo export` writes ONNX files in it, see export/quantize.py.


@dataclass(frozen=True)
class BackendRow:
    """What a backend can do."""

    devices: tuple[str, ...] | None  # kinds of device it runs on; None: every one that torch has here
    dtypes: tuple[str, ...]  # of the weights in memory, as `load` takes them
    exported: bool = False  # it runs the files of `micl-zoo export`, each in its own precision, and knows `providers`
    compiles: bool = False  # `Encoder.compile_blocks` works; the others compile by themselves.
    module: str | None = None  # that must be installed besides torch
    install: str = ""  # the command that does so

    @property
    def installed(self) -> bool:
        """Whether it can be imported here."""
        return self.module is None or find_spec(self.module) is not None


PRECISIONS = {
    "fp32": PrecisionRow("float32", "f32", exported=True),
    "bf16": PrecisionRow("bfloat16", "bf16"),
    "fp16": PrecisionRow("float16", "f16", exported=True),
    "int8": PrecisionRow(exported=True),
}
ONNX_PRECISIONS = tuple(name for name, row in PRECISIONS.items() if row.exported)
DTYPES = tuple(row.dtype for row in PRECISIONS.values() if row.dtype)
BACKENDS = {
    "torch": BackendRow(None, DTYPES, compiles=True),
    "openvino": BackendRow(("cpu",), ("float32",), module="openvino", install="pip install 'micl-zoo[openvino]'"),
    "onnx": BackendRow(("cpu", "cuda"), (), True, module="onnxruntime", install="pip install 'micl-zoo[onnx]'"),
}


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return the default number of decoding processes: one per usable core, MAX_WORKERS at most."""
    return min(usable_cores(), MAX_WORKERS)


def total_memory() -> int | None:
    """Return the bytes of memory that this machine has, or a container's limit; None where the system does not say."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (AttributeError, ValueError, OSError):  # Windows; no limit is "max"; no such group
        pass
    return min(found, default=None)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which `torch.compile` needs for the CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")))


def resolve_device(device: str) -> torch.device:
    """Return torch's device; "auto" is a GPU if there is one, else Apple's, else the CPU."""
    import torch

    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if not re.fullmatch(r"(?!meta)[a-z]+(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}. Valid: auto, cpu, cuda, cuda:N, mps.")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return target


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than float32 ones: Ampere and later, AVX-512 BF16, AMX."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    private = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch: it may drop them
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in private)


def fast_precision(device: torch.device) -> Precision:
    """Return what "auto" is on a device: bf16 where it is fast, else fp32."""
    return "bf16" if bf16_is_fast(device) else "fp32"


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolve "auto" for a device."""
    if precision == "auto":
        precision = fast_precision(device)
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}. Valid: auto, {', '.join(PRECISIONS)}.")
    if PRECISIONS[precision].dtype is None:
        way_on = f"export one with `micl-zoo export … --precision {precision}`, and give it as weights"
        raise UsageError(f"{precision} is a precision of ONNX files: {way_on}")
    return precision


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return what `torch.autocast` takes for a precision; None: autocast is off."""
    import torch

    name = PRECISIONS[precision].dtype
    return None if name in (None, "float32") else getattr(torch, name)


def autocasting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which matrix products are of a dtype; None leaves them that of the weights."""
    import torch

    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def precision_advice(precision: str, device: torch.device) -> str | None:
    """Return a one-line warning of a precision that works on the device but is slow there, or None."""
    auto = f"auto, which takes {fast_precision(device)} here"
    if precision == "fp16" and device.type == "cpu":
        return f"fp16 is several times slower than fp32 on a CPU. Take precision {auto}."
    if precision == "bf16" and device.type in ("cpu", "cuda") and not bf16_is_fast(device):
        what, better = ("CPU", auto) if device.type == "cpu" else ("GPU", "fp16")
        return f"this {what} emulates bf16, which takes longer than fp32. Take precision {better}."
    return None


def find_backend(name: str) -> BackendRow:
    """Return the row of a backend."""
    if name not in BACKENDS:
        raise UsageError(unknown("backend", name, BACKENDS))
    return BACKENDS[name]


def choose_backend(
    asked: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | None = None,  # None: not known yet, and no reason for OpenVINO
    precision: str = "fp32",
    compile: bool = False,  # by `torch.compile`, which only torch has
) -> Backend:
    """Resolve "auto": "onnx" for an .onnx file; OpenVINO on a CPU where it is installed and fast; else torch."""
    if asked != "auto":
        find_backend(asked)
        return cast(Backend, asked)
    if weights is not None and Path(weights).suffix == ".onnx":
        return "onnx"
    if device is None or device.type != "cpu" or compile or not BACKENDS["openvino"].installed:
        return "torch"
    return "openvino" if precision in ("fp32", fast_precision(device)) else "torch"


def backend_again(runtime: str, device: str) -> Backend:
    """Return the backend of a store's runtime if it can be had here, else torch, whose last digits may differ."""
    name = runtime.split()[0]  # without "compiled"
    row = BACKENDS.get(name, BACKENDS["torch"])
    here = row.installed and (row.devices is None or device.partition(":")[0] in ("auto", *row.devices))
    return cast(Backend, name) if name in BACKENDS and (row.exported or here) else "torch"  # ONNX: other weights
