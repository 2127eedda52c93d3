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
    from .encoders.encoder import Encoder, Features, load
    from .encoders.zoo import Record, list_models
    from .errors import ExportError, MiclZooError, SourceError, StoreError, TrainingError, UsageError, WeightsError
    from .images.transform import Transform
    from .sources.listing import ImageIndex, index_source, list_source
    from .stores.store import Store, open_store

_HOME = {
    "Encoder": "encoders.encoder",
    "ExportError": "errors",
    "Features": "encoders.encoder",
    "ImageIndex": "sources.listing",
    "MiclZooError": "errors",
    "Record": "encoders.zoo",
    "SourceError": "errors",
    "Store": "stores.store",
    "StoreError": "errors",
    "TrainingError": "errors",
    "Transform": "images.transform",
    "UsageError": "errors",
    "WeightsError": "errors",
    "index_source": "sources.listing",
    "list_models": "encoders.zoo",
    "list_source": "sources.listing",
    "load": "encoders.encoder",
    "open_store": "stores.store",
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
