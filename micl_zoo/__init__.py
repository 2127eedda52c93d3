"""Image embeddings you can trust: encoders pre-trained with masked image contrastive learning (MiCL, also called OCL).

    import micl_zoo

    encoder = micl_zoo.load()
    rows = encoder.embed(["a.jpg", "b.jpg"])  # (2, D)

Names are resolved when they are used, so importing this package imports neither torch nor timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .encoder import Encoder, Features, load
    from .errors import ExportError, MiclZooError, SourceError, StoreError, TrainingError, UsageError, WeightsError
    from .sources import ImageIndex, index_source, list_source
    from .store import Store, open_store
    from .transforms import Transform
    from .zoo import Record, list_models

_HOME = {
    "Encoder": "encoder",
    "ExportError": "errors",
    "Features": "encoder",
    "ImageIndex": "sources",
    "MiclZooError": "errors",
    "Record": "zoo",
    "SourceError": "errors",
    "Store": "store",
    "StoreError": "errors",
    "TrainingError": "errors",
    "Transform": "transforms",
    "UsageError": "errors",
    "WeightsError": "errors",
    "index_source": "sources",
    "list_models": "zoo",
    "list_source": "sources",
    "load": "encoder",
    "open_store": "store",
}

__all__ = [
    "Encoder",
    "ExportError",
    "Features",
    "ImageIndex",
    "MiclZooError",
    "Record",
    "SourceError",
    "Store",
    "StoreError",
    "TrainingError",
    "Transform",
    "UsageError",
    "WeightsError",
    "__version__",
    "index_source",
    "list_models",
    "list_source",
    "load",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'micl_zoo' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
