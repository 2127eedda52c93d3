"""Where a record was made: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from micl_zoo._version import package_versions


def code_commit() -> str | None:
    """Name the commit this code was run from, "-dirty" added where files differ from it; None outside a checkout.

    The variable MICL_ZOO_COMMIT names it where no .git travels along.
    """
    if given := os.environ.get("MICL_ZOO_COMMIT"):
        return given
    here = Path(__file__).resolve()
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
    try:
        git(["git", "ls-files", "--error-unmatch", here.name])  # another project's checkout does not know this file
        return git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def made_with(device: torch.device) -> dict[str, Any]:
    """Say when, where and with what the figures of a record were made."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": code_commit(),
        "machine": machine(device),
        "versions": package_versions(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the processor, or the card, in words and numbers."""
    facts: dict[str, Any] = {"device": device.type, "processor": _processor(), "cores": os.cpu_count()}
    facts["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "card_memory_gib": round(card.total_memory / 2**30, 1)}
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    if names := [name.strip() for key, _, name in lines if key.startswith("model name")]:
        return names[0]
    return platform.processor() or platform.machine()
