"""Certificates: how far a stand-in network can be from its target, proved and probed.

A certificate brackets ``sup over the box of max_o |f^(x) - f(x)|_o``: a proved bound from above
(interval or zonotope arithmetic, rounded outward), and the error at a concrete input from below.
It serves tickets and any other replacement of weights of a ReLU network: pruning, quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.lottery.attack import search_witness
from secateur.lottery.folded import FoldedNetwork, pruned_network
from secateur.lottery.intervals import propagate
from secateur.lottery.masked import MaskedNetwork
from secateur.lottery.network import Box, TargetNetwork
from secateur.lottery.philox import points
from secateur.lottery.ticket import Ticket
from secateur.lottery.zonotope import zonotope_error

Method = Literal["interval", "zonotope"]
FLOAT32 = (2.0**-24, 2.0**-149)
"""Unit roundoff and underflow of float32, with the subnormals that PyTorch keeps by default."""


@dataclass(frozen=True)
class Certificate:
    """The bracket on the sup error, and how it was obtained.

    Attributes:
        method: arithmetic of the bound.
        bound: no input of the box has a larger error in any output (exact real arithmetic).
        per_output: the bound of each output.
        empirical: largest error found, rounded down; ``witness`` attains it.
        weight_error: per layer, largest |stand-in - target| weight an input can meet.
        float32_bound: the same bound for the network *run in float32* (tickets only).
        float32_measured: largest |float32 run - folded float64| over ``samples`` points.
        samples: inputs of the float32 measurement.
    """

    method: Method
    bound: float
    per_output: tuple[float, ...]
    empirical: float
    weight_error: tuple[float, ...]
    float32_bound: float | None = None
    float32_measured: float | None = None
    samples: int = 0
    witness: Tensor | None = field(default=None, compare=False, repr=False)

    def record(self) -> dict[str, Any]:
        """For JSON; the witness is stored as a tensor elsewhere."""
        record = {k: v for k, v in self.__dict__.items() if k != "witness"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}

    @classmethod
    def from_record(cls, record: dict[str, Any], witness: Tensor | None) -> Certificate:
        """Back from JSON."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.items()
        }
        for name in ("per_output", "weight_error"):
            if not isinstance(values[name], tuple):
                raise TypeError(f"{name} is no list")
        numbers = [*values["per_output"], *values["weight_error"], values["bound"]]
        numbers += [values["empirical"], values.get("samples", 0)]
        numbers += [v for v in (values.get(f"float32_{k}") for k in ("bound", "measured")) if v]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
            raise TypeError("a claim is no number")
        return cls(**values, witness=witness)


def bound_error(network: FoldedNetwork, box: Box, method: str = "interval") -> Tensor:
    """Proved bound for each output, (outputs,); see ``Certificate.bound``."""
    if method == "interval":
        return propagate(network, box).error
    if method == "zonotope":
        return zonotope_error(network, box)
    raise UsageError("unknown method", field="method", value=method, fix="interval or zonotope")


def certify(
    network: FoldedNetwork | Ticket,
    box: Box | None = None,
    *,
    method: Method = "interval",
    seed: int = 0,
    starts: int = 32,
    samples: int = 256,
    data: Tensor | None = None,
) -> Certificate:
    """Certify a ticket, or any stand-in on a box.

    Args:
        network: a ticket (its masked network is also run in float32), or a folded network.
        box: required for a folded network; a ticket brings its own.
        method: ``interval``, or the tighter and slower ``zonotope``.
        seed: of the points the probes start from.
        starts: of the gradient ascent. samples: of the float32 measurement.
        data: real inputs to probe as well, (n, *input_shape).
    """
    ticket = network if isinstance(network, Ticket) else None
    folded = network.fold() if isinstance(network, Ticket) else network
    if box is None:
        if ticket is None:
            raise UsageError("a certificate needs a domain", field="domain", fix="domain=(0, 1)")
        box = ticket.box
    bounds = bound_error(folded, box, method)
    plain = propagate(folded, box)
    witness = search_witness(folded, box, seed, starts, data=data)
    result: dict[str, Any] = {}
    if ticket is not None:
        result["float32_bound"] = float(propagate(folded, box, *FLOAT32).error.max())
        result["float32_measured"] = float32_deviation(ticket, folded, box, seed, samples)
        result["samples"] = samples
    return Certificate(
        method=method,
        bound=float(bounds.max()),
        per_output=tuple(bounds.tolist()),
        empirical=witness.value,
        weight_error=tuple(layer.weight_error for layer in plain.layers),
        witness=witness.x,
        **result,
    )


def float32_deviation(
    ticket: Ticket, folded: FoldedNetwork, box: Box, seed: int = 0, samples: int = 256
) -> float:
    """Largest |masked network run in float32 - folded network in float64| over random points."""
    x = points(seed, samples, box.low, box.high).float()
    single = MaskedNetwork(ticket).run(x).double()
    with torch.no_grad():
        return float((single - folded.forward(x.double())).abs().max())


def certify_pruning(
    target: TargetNetwork,
    pruned: TargetNetwork | Sequence[Tensor],
    domain: Box | str | tuple[Any, Any],
    *,
    method: Method = "interval",
    data: Tensor | None = None,
    seed: int = 0,
) -> Certificate:
    """Certify any change of weights of a ReLU network on a box.

    Args:
        target: the network before.
        pruned: the network after, of the same architecture, or just its matrices.
        domain: box of inputs.
        method, data, seed: as for ``certify``.
    """
    if isinstance(pruned, TargetNetwork):
        if pruned.description() != target.description():
            raise UsageError(
                "the two networks differ in architecture, so their outputs are not comparable "
                "layer by layer",
                field="pruned",
                fix="keep shapes and activations; set removed weights to zero",
            )
        pruned = [layer.matrix for layer in pruned.layers]
    shapes = [layer.matrix.shape for layer in target.layers]
    if [matrix.shape for matrix in pruned] != shapes:
        raise UsageError("one matrix of the target's shape per layer is needed", field="pruned")
    if not all(bool(matrix.isfinite().all()) for matrix in pruned):
        raise UsageError("the weights are not all finite", field="pruned")
    box = Box.of(domain, target.input_shape)
    return certify(pruned_network(target, pruned), box, method=method, data=data, seed=seed)
