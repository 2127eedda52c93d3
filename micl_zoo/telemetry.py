"""Keeps the packages that this one loads from sending what nobody asked them to send."""

from __future__ import annotations

import os
import sys

# By each package's own documents; children inherit it. What a user has set stays as it is.
OFF = {
    "DO_NOT_TRACK": "1",  # https://donottrack.sh, which huggingface_hub and others heed
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime, from 1.30 on also outside of Windows: requests, an id in ~/.cache
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",  # to another place than the runs that --wandb asks for
}


def no_telemetry() -> None:
    """Switch off the telemetry of all that this package may import; call it before such an import."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
    # OpenVINO has no variable. Without this package, which pip installs with it, it sends nothing, by its own design;
    # with it, 30 requests to an analytics host when it is imported, and an id in ~/intel.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import raises ImportError
    if constants := sys.modules.get("huggingface_hub.constants"):  # which timm imported before, and has read its own
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
