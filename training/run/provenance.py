"""Where a record was made: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
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
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() if tracked.returncode == 0 else None


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
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
