"""Leave PyTorch: encoders as ONNX files that were compared with PyTorch on real photographs.

    from micl_zoo.export import to_onnx

    to_onnx("vit_ti16.tin200", "onnx/")

Needs micl-zoo[onnx].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import Drift
    from .write import Export, to_onnx

__all__ = ["Drift", "Export", "to_onnx"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'micl_zoo.export' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(".check" if name == "Drift" else ".write", __name__), name)
