"""Train encoders: the MiCL method, its recipes, and the loop that trains them.

    from micl_zoo.training import adapt, pretrain

    adapt("vit_small_patch14_reg4_dinov2.lvd142m", "photos/", "runs/mine")
    pretrain("vit_ti16.tin200", "images/", "runs/first")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .finetuning.finetune import finetune
    from .pretraining.adapt import adapt
    from .pretraining.pretrain import pretrain

__all__ = ["adapt", "finetune", "pretrain"]
_HOMES = {"adapt": ".pretraining.adapt", "finetune": ".finetuning.finetune", "pretrain": ".pretraining.pretrain"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'micl_zoo.training' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
