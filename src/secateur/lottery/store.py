"""A ticket's file: safetensors with a JSON header; a seed and bits, the target, the certificate.

Tensors, for each layer i: ``target.i`` (the target's float64 weights, which the claim is about),
``sizes.i`` (neurons per pool; one number if all are equal), ``counts.i`` (kept edges per output
and column) and ``neurons.i`` (which neurons, in that order). ``box.low``, ``box.high``, and
``witness`` if certified. No weight of the random network is stored. Whatever does not fit
together is refused on reading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import UsageError, VerificationError
from secateur.lottery.certificate import Certificate
from secateur.lottery.laws import Law
from secateur.lottery.network import Box, Layer, TargetNetwork
from secateur.lottery.philox import check_seed
from secateur.lottery.reading import METADATA_KEY
from secateur.lottery.sizing import check_eps
from secateur.lottery.ticket import Ticket, TicketLayer
from secateur.tensorfile import opened, save_tensors

FORMAT, VERSION = "secateur.lottery.ticket", 1
LISTS = ("sizes", "counts", "neurons")
WHOLE = (torch.uint8, torch.int16, torch.int32, torch.int64)


def save_ticket(ticket: Ticket, path: str | Path, certificate: Certificate | None = None) -> None:
    """Write the ticket, whole or not at all."""
    tensors: dict[str, Tensor] = {"box.low": ticket.box.low, "box.high": ticket.box.high}
    layers: list[dict[str, Any]] = []
    for number, (layer, kept) in enumerate(zip(ticket.target.layers, ticket.layers, strict=True)):
        tensors[f"target.{number}"] = layer.matrix.contiguous()
        for name, values in kept.lists(layer).items():
            tensors[f"{name}.{number}"] = torch.from_numpy(values)
        layers.append(
            {
                "law": kept.law.record(),
                "per_weight": kept.per_weight,
                "copies": kept.copies,
                "carried": kept.carried,
            }
        )
    header = {
        "format": FORMAT,
        "version": VERSION,
        "generator": "philox4x32-10",
        "seed": ticket.seed,
        "construction": ticket.construction,
        "eps": ticket.eps,
        "weight_eps": list(ticket.weight_eps),
        "target": ticket.target.description(),
        "target_sha256": ticket.target.digest(),
        "layers": layers,
        "history": ticket.history,
        "certificate": certificate.record() if certificate else None,
    }
    if certificate is not None and certificate.witness is not None:
        tensors["witness"] = certificate.witness.contiguous()
    save_tensors(path, tensors, {FORMAT: json.dumps(header)})


def load_ticket(path: str | Path) -> tuple[Ticket, Certificate | None]:
    """Read a ticket and the certificate stored with it, if any; checks the format only.

    Raises:
        UsageError: not a ticket's file. VerificationError: its parts contradict each other.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if FORMAT not in metadata:
        raise UsageError(
            "a safetensors file, but not a ticket",
            field="ticket",
            value=str(path),
            fix="tickets are written by `secateur lottery find`",
        )
    try:
        return _decode(json.loads(metadata[FORMAT]), tensors)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise VerificationError(f"the ticket's file is damaged: {error!r}") from None


def _decode(
    header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Ticket, Certificate | None]:
    if header["version"] != VERSION or header["generator"] != "philox4x32-10":
        raise UsageError(
            "this ticket needs another version of Secateur",
            field="version",
            value=header["version"],
        )
    count = len(header["target"])
    _whole(len(header["layers"]) == len(header["weight_eps"]) == count, "layers are missing")
    known = {f"{kind}.{i}" for kind in ("target", *LISTS) for i in range(count)}
    known |= {"box.low", "box.high", "witness"}
    _whole(set(tensors) <= known, f"unknown tensors {sorted(set(tensors) - known)}")
    for name, tensor in tensors.items():
        lists = name.split(".")[0] in LISTS
        sound = tensor.dtype in WHOLE if lists else tensor.dtype == torch.float64
        _whole(sound, f"{name} holds {tensor.dtype}")
        _whole(lists or bool(tensor.isfinite().all()), f"{name} is not finite")
    matrices = [tensors[f"target.{i}"] for i in range(count)]
    target = TargetNetwork.from_description(header["target"], matrices)
    if target.digest() != header["target_sha256"]:
        raise VerificationError("the target's weights do not match their recorded SHA-256")
    for name in ("box.low", "box.high", "witness"):
        shape = tuple(tensors[name].shape) if name in tensors else target.input_shape
        _whole(shape == tuple(target.input_shape), f"{name} has shape {shape}")
    layers: list[TicketLayer] = []
    for i, part in enumerate(header["layers"]):
        layers.append(_layer(target.layers[i], part, tensors, i))
        before = layers[i - 1].copies if i and layers[i].carried else layers[i].carried
        _whole(layers[i].carried == before, f"layer {i} reads copies that are not there")
        _whole(i == 0 or layers[i - 1].copies in (1, layers[i].carried), f"layer {i}: lost copies")
    _whole(layers[0].carried == 0 and layers[-1].copies == 1, "copies at the ends")
    for value in (*header["weight_eps"], *([header["eps"]] if header["eps"] is not None else [])):
        check_eps(value, "eps")
    for name in ("construction", "history"):
        _whole(isinstance(header[name], dict), f"{name} is no table")
    ticket = Ticket(
        target,
        Box(tensors["box.low"], tensors["box.high"]),
        check_seed(header["seed"]),
        tuple(layers),
        header["construction"],
        tuple(header["weight_eps"]),
        header["eps"],
        header["history"],
    )
    record = header["certificate"]
    return ticket, Certificate.from_record(record, tensors.get("witness")) if record else None


def _whole(sound: bool, words: str) -> None:
    if not sound:
        raise VerificationError(f"the ticket's file is damaged: {words}")


def _layer(
    layer: Layer, part: dict[str, Any], tensors: dict[str, Tensor], number: int
) -> TicketLayer:
    columns, copies, carried = layer.matrix.shape[1], part["copies"], part["carried"]
    per_weight = part["per_weight"]
    _whole(type(per_weight) is bool, f"layer {number}: per_weight={per_weight!r}")
    _whole(type(copies) is int and copies >= 1, f"layer {number}: copies={copies!r}")
    _whole(type(carried) is int and carried >= 0, f"layer {number}: carried={carried!r}")
    dense = layer.geometry.kernel is None
    _whole(dense or (copies == 1 and not carried), f"layer {number}: copies of a convolution")
    counts, neuron, sizes = (
        tensors[f"{name}.{number}"].numpy().astype(np.int64)
        for name in ("counts", "neurons", "sizes")
    )
    pools = layer.matrix.numel() if per_weight else columns
    if len(sizes) == 1:
        sizes = np.repeat(sizes, pools)
    cells = layer.matrix.shape[0] * copies * columns
    for name, values in (("counts", counts), ("neurons", neuron), ("sizes", sizes)):
        _whole(bool((values >= 0).all()), f"layer {number}: negative {name}")
    if len(counts) != cells or counts.sum() != len(neuron) or len(sizes) != pools:
        raise VerificationError(f"layer {number}: the edge lists have the wrong length")
    cell = np.repeat(np.arange(cells), counts)
    return TicketLayer(
        Law(**part["law"]),
        per_weight,
        sizes,
        cell // columns,
        cell % columns,
        neuron,
        copies,
        carried,
    )


def save_network(target: TargetNetwork, path: str | Path) -> None:
    """Write a target with its architecture, for the command line."""
    tensors = {f"matrix.{i}": layer.matrix for i, layer in enumerate(target.layers)}
    save_tensors(path, tensors, {METADATA_KEY: json.dumps(target.description())})
