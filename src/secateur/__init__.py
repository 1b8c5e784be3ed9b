"""Secateur makes trained models smaller and faster, and proves it.

>>> import secateur
>>> result = secateur.prune("tiny", method="wanda", sparsity=0.5, out=None)  # doctest: +SKIP
>>> result.report["totals"]["delivered"]                                    # doctest: +SKIP
0.5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Resolved on first use, so that importing secateur does not import torch.
_LAZY = {
    "prune": "secateur.api",
    "allocate": "secateur.api",
    "evaluate": "secateur.api",
    "apply_mask": "secateur.models.mask_file",
    "pretrain": "secateur.api",
    "recover": "secateur.api",
    "load_pruned": "secateur.export.loading",
    "load_vision": "secateur.models.vision.loading",
    "save_pruned": "secateur.export.pruned",
    "prune_vision": "secateur.api",
    "prune_heads": "secateur.methods.heads",
    "search_plan": "secateur.run.plan_search",
    "Recipe": "secateur.recipe",
    "Result": "secateur.run.runner",
    "Target": "secateur.masks.target",
    "SecateurError": "secateur.errors",
    "UsageError": "secateur.errors",
}

__all__ = [
    "Recipe",
    "Result",
    "SecateurError",
    "Target",
    "UsageError",
    "__version__",
    "allocate",
    "apply_mask",
    "evaluate",
    "load_pruned",
    "load_vision",
    "pretrain",
    "prune",
    "prune_heads",
    "prune_vision",
    "recover",
    "save_pruned",
    "search_plan",
]

if TYPE_CHECKING:
    from secateur.api import allocate, evaluate, pretrain, prune, recover
    from secateur.errors import SecateurError, UsageError
    from secateur.export.loading import load_pruned
    from secateur.export.pruned import save_pruned
    from secateur.masks.target import Target
    from secateur.methods.heads import prune_heads
    from secateur.models.mask_file import apply_mask
    from secateur.models.vision.loading import load_vision
    from secateur.recipe import Recipe
    from secateur.run.plan_search import search_plan
    from secateur.run.runner import Result


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
