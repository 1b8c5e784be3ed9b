"""A ticket's file: safetensors with a JSON header; a seed and bits, the target, the certificate.

Tensors, for each layer i: ``target.i`` (the target's float64 weights, which the claim is about),
``sizes.i`` (neurons per pool), ``counts.i`` (kept edges per output and column) and ``neurons.i``
(which neurons, in that order). ``box.low``, ``box.high``, and ``witness`` if certified. No weight
of the random network is stored.
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
from secateur.lottery.ticket import Ints, Ticket, TicketLayer
from secateur.tensorfile import opened, save_tensors

FORMAT, VERSION = "secateur.lottery.ticket", 1


def save_ticket(ticket: Ticket, path: str | Path, certificate: Certificate | None = None) -> None:
    """Write the ticket, whole or not at all."""
    tensors: dict[str, Tensor] = {"box.low": ticket.box.low, "box.high": ticket.box.high}
    layers: list[dict[str, Any]] = []
    for number, (layer, kept) in enumerate(zip(ticket.target.layers, ticket.layers, strict=True)):
        columns = layer.matrix.shape[1]
        counts = np.bincount(
            kept.output * columns + kept.column,
            minlength=layer.matrix.shape[0] * kept.copies * columns,
        )
        tensors[f"target.{number}"] = layer.matrix.contiguous()
        tensors[f"sizes.{number}"] = torch.from_numpy(kept.sizes.astype(np.int64))
        tensors[f"counts.{number}"] = _narrow(counts)
        tensors[f"neurons.{number}"] = _narrow(kept.neuron)
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
    matrices = [tensors[f"target.{i}"] for i in range(len(header["target"]))]
    target = TargetNetwork.from_description(header["target"], matrices)
    if target.digest() != header["target_sha256"]:
        raise VerificationError("the target's weights do not match their recorded SHA-256")
    layers = tuple(
        _layer(target.layers[i], part, tensors, i) for i, part in enumerate(header["layers"])
    )
    ticket = Ticket(
        target,
        Box(tensors["box.low"], tensors["box.high"]),
        check_seed(header["seed"]),
        layers,
        header["construction"],
        tuple(header["weight_eps"]),
        header["eps"],
        header["history"],
    )
    record = header["certificate"]
    return ticket, Certificate.from_record(record, tensors.get("witness")) if record else None


def _layer(
    layer: Layer, part: dict[str, Any], tensors: dict[str, Tensor], number: int
) -> TicketLayer:
    columns, copies = layer.matrix.shape[1], part["copies"]
    counts = tensors[f"counts.{number}"].numpy().astype(np.int64)
    neuron = tensors[f"neurons.{number}"].numpy().astype(np.int64)
    cells = layer.matrix.shape[0] * copies * columns
    pools = layer.matrix.numel() if part["per_weight"] else columns
    sizes: Ints = tensors[f"sizes.{number}"].numpy()
    if len(counts) != cells or counts.sum() != len(neuron) or len(sizes) != pools:
        raise VerificationError(f"layer {number}: the edge lists have the wrong length")
    cell = np.repeat(np.arange(cells), counts)
    return TicketLayer(
        Law(**part["law"]),
        part["per_weight"],
        sizes,
        cell // columns,
        cell % columns,
        neuron,
        copies,
        part["carried"],
    )


def save_network(target: TargetNetwork, path: str | Path) -> None:
    """Write a target with its architecture, for the command line."""
    tensors = {f"matrix.{i}": layer.matrix for i, layer in enumerate(target.layers)}
    save_tensors(path, tensors, {METADATA_KEY: json.dumps(target.description())})


def _narrow(values: Ints) -> Tensor:
    """The smallest unsigned type that holds the values."""
    top = int(values.max(initial=0))
    kind = np.uint8 if top < 2**8 else np.int16 if top < 2**15 else np.int32
    return torch.from_numpy(values.astype(kind))
