"""One way in for vision networks: a name, a folder of ours, timm, or a function that makes one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.images import Preprocess
from secateur.errors import SecateurError, UsageError
from secateur.masks.structured import StructuredMask, remember
from secateur.models.attention_heads import narrow_qkv
from secateur.models.channel_graph import channel_groups
from secateur.models.channel_sizes import set_sizes
from secateur.models.channel_surgery import shrink_channels
from secateur.models.checks import fingerprint_model
from secateur.models.vision.names import MANIFEST, ZOO, factory, is_vision
from secateur.tensorfile import opened

__all__ = ["MANIFEST", "ZOO", "VisionModel", "fill", "is_vision", "load_vision"]

WEIGHTS = "model.safetensors"
FORMAT = 1
_SIZED = ("vit", "swin")
LITE0 = Preprocess((127.0,) * 3, (128.0,) * 3, 256, 224)
"""What EfficientNet-Lite0's weights were trained on."""


@dataclass
class VisionModel:
    """A network ready for work.

    Attributes:
        model: in evaluation mode.
        name: for people and reports.
        source: how to build it again, without weights: ``{"kind": "zoo", "name": ..., "options":
            ...}``; None if only the caller can.
        trained: whether its weights mean anything.
        preprocess: what it was trained on, None if that is the images' business.
        input: (C, H, W) it was made for, if known.
        classes: names, if known.
        folder: where its files lie.
        notes: what a report should mention.
        masks: parameter name -> bool, single weights that are gone.
    """

    model: nn.Module
    name: str
    source: dict[str, Any] | None = None
    trained: bool = True
    preprocess: Preprocess | None = None
    input: tuple[int, int, int] | None = None
    classes: tuple[str, ...] = ()
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A hash of its weights."""
        return fingerprint_model(self.model)


def load_vision(
    spec: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    channels: int | None = None,
    classes: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> VisionModel:
    """A vision network by name.

    Args:
        spec: ``efficientnet-lite0`` (with ImageNet weights), ``resnet``, ``wrn``, ``mobilenet``,
            ``vit``, ``swin`` (with random weights), ``timm:NAME``, a folder that a vision run
            wrote, or ``package.module:function`` that returns a network.
        options: arguments of the network's class or function; ``pretrained: false`` leaves
            EfficientNet-Lite0 and timm's without weights.
        channels, classes, size: of the images, for networks that are made for them.
        seed: of random weights.

    Raises:
        UsageError: no such network; wrong options; a package is missing.
        SecateurError: damaged files.
    """
    text, given = str(spec), dict(options or {})
    if (Path(text) / MANIFEST).is_file():
        _no_options(given, text)
        return _from_folder(Path(text))
    if text == "efficientnet-lite0" and given.pop("pretrained", True):
        from secateur.models.vision.efficientnet_lite import pretrained

        _no_options(given, text)
        source = {"kind": "zoo", "name": text, "options": {}}
        return VisionModel(pretrained(), text, source, True, LITE0, (3, 224, 224))
    if text in ZOO:
        made_for = {"channels": channels, "classes": classes}
        made_for |= {"size": size} if text in _SIZED else {}
        given = {k: v for k, v in made_for.items() if v is not None} | given
        source = {"kind": "zoo", "name": text, "options": given}
        return VisionModel(_built(source, seed), text, source, trained=False)
    if text.startswith("timm:"):
        made_for = {"in_chans": channels, "num_classes": classes}
        return _timm(text.removeprefix("timm:"), given, made_for, seed)
    if ":" in text:
        source = {"kind": "factory", "name": text, "options": given}
        return VisionModel(_built(source, seed), text, source)
    near = difflib.get_close_matches(text, ZOO, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UsageError(
        "no vision network of that name, and no folder that a vision run wrote",
        field="model",
        value=text,
        fix=f"{hint}one of {', '.join(ZOO)}; timm:NAME; package.module:function",
    )


def _no_options(options: Mapping[str, Any], name: str) -> None:
    if options:
        raise UsageError(
            f"'{name}' is made already and takes no options",
            field="model_options",
            value=dict(options),
        )


def _built(source: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The network a record names, with random weights of ``seed``."""
    name, options = str(source["name"]), dict(source["options"])
    if source["kind"] == "timm":
        return _make_timm(name, options | {"pretrained": False}, seed)
    make = factory(ZOO[name] if source["kind"] == "zoo" else name)
    if make is None:
        raise UsageError(
            "no such function can be imported",
            field="model",
            value=name,
            fix="package.module:function, importable from here",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make(**options)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"'{name}' cannot be made ({error})", field="model_options", value=options
            ) from None
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"made a {type(model).__name__}, not a torch.nn.Module", field="model", value=name
        )
    return model.eval()


def _make_timm(name: str, options: dict[str, Any], seed: int = 0) -> nn.Module:
    try:
        import timm
    except Exception as error:  # an install without torchvision's operators raises what it likes
        raise UsageError(
            f"the package 'timm' cannot be imported ({type(error).__name__}: {error})",
            field="model",
            value=f"timm:{name}",
            fix="pip install timm, with the torchvision that fits your torch",
        ) from None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = timm.create_model(name, **options)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise UsageError(
            f"timm cannot make it ({error})", field="model", value=f"timm:{name}"
        ) from None
    return model.eval()


def _timm(
    name: str, options: dict[str, Any], made_for: Mapping[str, int | None], seed: int
) -> VisionModel:
    """One of timm's with its weights and scaling; without weights made for the images at hand."""
    weights = bool(options.pop("pretrained", True))
    if not weights:
        options = {k: v for k, v in made_for.items() if v is not None} | options
    model = _make_timm(name, options | {"pretrained": weights}, seed)
    source = {"kind": "timm", "name": name, "options": options}
    if not weights:
        return VisionModel(model, f"timm:{name}", source, trained=False)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    _, *sides = config.get("input_size") or (3, 224, 224)
    shape = (int(options.get("in_chans", 3)), *(int(side) for side in sides))
    mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
    if len(mean) != shape[0]:  # as timm averages the weights of the first layer
        mean, std = ((sum(line) / len(line),) * shape[0] for line in (mean, std))
    side = int(options.get("img_size", shape[-1]))
    resize = int(side / float(config.get("crop_pct") or 0.875))
    how = Preprocess(
        tuple(round(255 * m, 4) for m in mean), tuple(round(255 * s, 4) for s in std), resize, side
    )
    return VisionModel(model, f"timm:{name}", source, True, how, (shape[0], side, side))


# -- folders of ours -------------------------------------------------------------------------------


def read_vision_manifest(folder: Path) -> dict[str, Any]:
    """What ``save_vision`` wrote beside the weights.

    Raises:
        UsageError: no such folder. SecateurError: damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"has no {MANIFEST}", field="folder", value=str(folder))
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise UsageError(
                f"was written in format {record['format']}, this is {FORMAT}",
                field="folder",
                value=str(folder),
                fix="a newer secateur",
            )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SecateurError(f"'{path}' is damaged ({error})") from None
    return record


def _from_folder(folder: Path) -> VisionModel:
    record = read_vision_manifest(folder)
    if record["source"] is None:
        raise UsageError(
            "only its maker can build this network: it was in memory when it was pruned",
            field="model",
            value=str(folder),
            fix="secateur.models.vision.loading.fill(NETWORK, FOLDER) from Python",
        )
    model = fill(_built(record["source"]), folder)
    masks: dict[str, Tensor] = {}
    if (folder / "masks.safetensors").is_file():
        from secateur.masks.store import load_masks

        masks = dict(load_masks(folder / "masks.safetensors"))
    how = record["preprocess"]
    return VisionModel(
        model,
        record["name"],
        record["source"],
        True,
        None if how is None else Preprocess.parse(how),
        tuple(record["input"]),
        tuple(record["classes"]),
        folder,
        masks=masks,
    )


def fill(model: nn.Module, folder: str | Path) -> nn.Module:
    """Cut a whole network to the shape of a saved one, and give it those weights, in place.

    Args:
        model: made as the one that was pruned was made.
        folder: written by ``save_vision``.

    Raises:
        SecateurError: the network is another one, or the files are damaged.
    """
    folder = Path(folder)
    record = read_vision_manifest(folder)
    mask = StructuredMask.parse(record["structure"], str(folder / MANIFEST))
    example = torch.zeros(1, *record["input"])
    narrow_qkv(model, record.get("rewritten", ()))
    if any(bool(gone.any()) for gone in mask.gone.values()):
        groups = channel_groups(model, example, unknown=record.get("unknown", "error"))
        shrink_channels(model, groups, mask)
    set_sizes(model, record.get("sizes", {}))
    remember(model, mask)
    with opened(folder / WEIGHTS) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    add_biases(model, state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SecateurError(
            f"the weights in '{folder}' are another network's ({str(error).splitlines()[-1].strip()})"
        ) from None
    return model.eval()


def add_biases(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Biases that a saved network was given where the original has none."""
    for name in set(state) - set(model.state_dict()):
        owner, _, leaf = name.rpartition(".")
        module = dict(model.named_modules()).get(owner)
        if leaf == "bias" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.bias = nn.Parameter(torch.zeros_like(state[name]))
