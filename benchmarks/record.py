"""What a record says beside its figures, and how it is written; a module of the scripts beside it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from micl_zoo.files import write_text
from micl_zoo.training.run.provenance import made_with

OPTIONAL = ("openvino", "onnxruntime", "onnxruntime-gpu", "torchvision")
CPU_FLAGS = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)


def made_on(device: torch.device) -> dict[str, Any]:
    """Date, commit, machine and versions, with the processor's flags and packages that only some contenders need."""
    found = made_with(device)
    optional = {name: version_of(name) for name in OPTIONAL}
    found["versions"] |= {name: there for name, there in optional.items() if there != "not installed"}
    found["machine"]["flags"] = cpu_flags()
    return found


def version_of(package: str) -> str:
    """Version of a package that may be missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_flags() -> list[str]:
    """Flags of the processor that decide a rate, where Linux lists them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return [flag for flag in CPU_FLAGS if flag in words]


def missing(*packages: str) -> str | None:
    """Name the packages that are not installed; None if all are."""
    gone = [name for name in packages if not find_spec(name)]
    return f"{', '.join(gone)} not installed" if gone else None


def options_text(options: dict[str, Any], *names: str) -> str:
    """Write chosen options as they were given on the command line."""
    return " ".join(f"--{name.replace('_', '-')} {options[name]}" for name in names)


def write(record: dict[str, Any], out: Path | None) -> None:
    """Write a record as JSON, if there is somewhere to write it to."""
    if out is not None:
        write_text(out, json.dumps(record, indent=1) + "\n")
