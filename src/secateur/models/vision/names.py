"""What vision networks are called; nothing here needs torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "vision.json"
ZOO: dict[str, str] = {
    "resnet": "secateur.models.vision.resnet:ResNet",
    "wrn": "secateur.models.vision.resnet:wrn",
    "mobilenet": "secateur.models.vision.mobilenet:MobileNet",
    "vit": "secateur.models.vision.vit:ViT",
    "swin": "secateur.models.vision.vit:Swin",
    "efficientnet-lite0": "secateur.models.vision.efficientnet_lite:EfficientNetLite0",
}


def is_vision(spec: str) -> bool:
    """Whether a model's name or folder says that it is a vision network."""
    return (
        spec in ZOO
        or spec.startswith("timm:")
        or (Path(spec) / MANIFEST).is_file()
        or (":" in spec and factory(spec) is not None)
    )


def factory(spec: str) -> Callable[..., Any] | None:
    """The function ``package.module:name`` names, None if there is no such module.

    Modules of the current folder are found too, last of all; ``net.py:make`` is ``net:make``.
    """
    module, _, attribute = spec.partition(":")
    module = module.removesuffix(".py")
    if not all(part.isidentifier() for part in module.split(".")) or not attribute.isidentifier():
        return None
    if str(Path.cwd()) not in sys.path:  # it is not there where 'secateur' is a script
        sys.path.append(str(Path.cwd()))
    try:
        if importlib.util.find_spec(module) is None:
            return None
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None
    return found if callable(found) else None
