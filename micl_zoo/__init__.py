"""Image embeddings you can trust: encoders pre-trained with masked image contrastive learning (MiCL, also called OCL).

    import micl_zoo

    encoder = micl_zoo.load()
    rows = encoder.embed(["a.jpg", "b.jpg"])  # (2, D)
    micl_zoo.extract("photos/", "embeddings")

Importing this package imports nothing: names are resolved when they are used.
"""

from __future__ import annotations

from ._version import __version__

TYPE_CHECKING = False  # for type checkers it is True; importing typing takes longer than all the rest
if TYPE_CHECKING:  # what _LATER says; a test compares the two
    from typing import Any

    from .encoders.encoder import Embedded, Encoder, Features
    from .encoders.load import load
    from .errors import (
        ExportError,
        Interrupted,
        MiclZooError,
        Refused,
        SourceError,
        StoreError,
        TrainingError,
        UsageError,
        WeightsError,
    )
    from .extraction.extract import Summary, extract
    from .extraction.options import ExtractOptions
    from .images.transform import Transform
    from .sources.index import ImageIndex
    from .sources.listing import index_source, list_source
    from .stores.convert import convert
    from .stores.search import search, text_encoder
    from .stores.store import Store, open_store
    from .stores.verify import verify
    from .zoo.hub import download
    from .zoo.ours import Record, list_models

_LATER = {
    "encoders.encoder": ("Embedded", "Encoder", "Features"),
    "encoders.load": ("load",),
    "errors": (
        "ExportError",
        "Interrupted",
        "MiclZooError",
        "Refused",
        "SourceError",
        "StoreError",
        "TrainingError",
        "UsageError",
        "WeightsError",
    ),
    "extraction.extract": ("Summary", "extract"),
    "extraction.options": ("ExtractOptions",),
    "images.transform": ("Transform",),
    "sources.index": ("ImageIndex",),
    "sources.listing": ("index_source", "list_source"),
    "stores.convert": ("convert",),
    "stores.search": ("search", "text_encoder"),
    "stores.store": ("Store", "open_store"),
    "stores.verify": ("verify",),
    "zoo.hub": ("download",),
    "zoo.ours": ("Record", "list_models"),
}

__all__ = [
    "Embedded",
    "Encoder",
    "ExportError",
    "ExtractOptions",
    "Features",
    "ImageIndex",
    "Interrupted",
    "MiclZooError",
]
__all__ += ["Record", "Refused", "SourceError", "Store", "StoreError", "Summary", "TrainingError", "Transform"]
__all__ += ["UsageError", "WeightsError", "__version__", "convert", "download", "extract", "index_source"]
__all__ += ["list_models", "list_source", "load", "open_store", "search", "text_encoder", "verify"]


def __getattr__(name: str) -> Any:
    import importlib

    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'micl_zoo' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
