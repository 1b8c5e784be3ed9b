"""Re-checking a ticket's file: everything is recomputed from the seed and the bits.

The random weights are regenerated, the network is folded, bounded and run again, and each claim is
compared with what comes out. The claims are the certificate's ``bound``, ``per_output``,
``weight_error``, ``empirical`` (at the witness) and ``float32_bound``, and the ticket's ``eps``.
Its ``weight_eps`` is one unless the history records weights that missed it. The history,
``float32_measured`` and ``samples`` say what was seen once; they are no claims and not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import VerificationError
from secateur.lottery.certificate import FLOAT32, Certificate, bound_error
from secateur.lottery.folded import FoldedNetwork
from secateur.lottery.intervals import gap_from_below, propagate
from secateur.lottery.masked import MaskedNetwork
from secateur.lottery.network import TargetNetwork
from secateur.lottery.philox import points
from secateur.lottery.store import load_ticket
from secateur.lottery.ticket import Ticket

SLACK = 1 + 1e-9
"""A bound recomputed elsewhere may differ in the last digits (BLAS adds in another order)."""


@dataclass(frozen=True)
class Check:
    """One claim and whether it holds."""

    name: str
    holds: bool
    words: str


@dataclass(frozen=True)
class Verification:
    """All checks of one ticket."""

    ticket: Ticket
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(check.holds for check in self.checks)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "holds": self.holds,
            "seed": self.ticket.seed,
            "construction": self.ticket.construction,
            "checks": [vars(check) for check in self.checks],
        }

    def raise_if_false(self) -> Verification:
        """Itself, or a ``VerificationError`` naming what does not hold."""
        if not self.holds:
            failed = "; ".join(f"{c.name}: {c.words}" for c in self.checks if not c.holds)
            raise VerificationError(f"the ticket is not what it claims: {failed}")
        return self


def verify_ticket(
    path: str | Path, target: TargetNetwork | None = None, samples: int = 64
) -> Verification:
    """Re-check a ticket's file from its seed.

    Args:
        path: written by ``save_ticket``.
        target: also check that the ticket was made for this network.
        samples: inputs on which the masked network is run in float32.
    """
    ticket, certificate = load_ticket(path)
    ticket.check()
    kept = sum(len(layer.output) for layer in ticket.layers)
    checks = [Check("bits", True, f"{kept:,} kept edges, all edges of the random network")]
    if target is not None:
        same = target.digest() == ticket.target.digest()
        words = "is the network given" if same else "is not the network given"
        checks.append(Check("target", same, words))
    folded = ticket.fold()
    checks.append(_weights(ticket, folded))
    if certificate is None:
        checks.append(Check("certificate", False, "the file holds none"))
    else:
        checks += _certificate(ticket, folded, certificate)
        checks.append(_float32_run(ticket, folded, certificate, samples))
    return Verification(ticket, tuple(checks))


def _weights(ticket: Ticket, folded: FoldedNetwork) -> Check:
    found = [layer.weight_error for layer in propagate(folded, ticket.box).layers]
    accepted = sum(r["failed_weights"] for r in ticket.history.get("layers", []))
    # Of copies, each may be off by weight_eps times the sum it stands in.
    near = all(f <= w * (1 + 1e-6) + 1e-12 for f, w in zip(found, ticket.weight_eps, strict=True))
    words = f"largest error {max(found):.3g}, asked {max(ticket.weight_eps):.3g}"
    if accepted:
        words += f"; {accepted} recorded as further off"
    return Check("weights from the seed", near or accepted > 0, words)


def _certificate(ticket: Ticket, folded: FoldedNetwork, claimed: Certificate) -> list[Check]:
    fresh = bound_error(folded, ticket.box, claimed.method)
    bound = float(fresh.max())
    found = [layer.weight_error for layer in propagate(folded, ticket.box).layers]
    each = _below(fresh.tolist(), claimed.per_output)
    words = f"recomputed {bound:.6g} ({claimed.method}), claimed {claimed.bound:.6g}"
    checks = [
        Check(
            "bound",
            bound <= claimed.bound * SLACK and each,
            words if each else words + "; some output's bound is above its claim",
        ),
        Check(
            "weight error",
            _below(found, claimed.weight_error),
            f"recomputed {_list(found)}, claimed {_list(claimed.weight_error)}",
        ),
    ]
    if ticket.eps is not None:
        words = f"bound {bound:.4g}, asked {ticket.eps:.4g}"
        checks.append(Check("epsilon", bound <= ticket.eps * SLACK, words))
    witness = claimed.witness
    if witness is None:
        checks.append(Check("witness", False, "the file holds none"))
    else:
        inside = bool(((witness >= ticket.box.low) & (witness <= ticket.box.high)).all())
        value = gap_from_below(folded, witness)
        agrees = abs(value - claimed.empirical) <= 1e-9 * (1 + claimed.empirical)
        words = f"error {value:.6g} at the witness, claimed {claimed.empirical:.6g}"
        checks.append(Check("witness", inside and agrees and value <= bound, words))
    return checks


def _below(found: Sequence[float], claimed: Sequence[float]) -> bool:
    """Whether every number found is within its claim (a NaN is not)."""
    pairs = zip(found, claimed, strict=False)
    return len(found) == len(claimed) and all(f <= c * SLACK for f, c in pairs)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _float32_run(
    ticket: Ticket, folded: FoldedNetwork, certificate: Certificate, samples: int
) -> Check:
    """The masked network itself, in float32, stays within its own proved bound of the target."""
    x = points(ticket.seed, samples, ticket.box.low, ticket.box.high).float()
    limit = float(propagate(folded, ticket.box, *FLOAT32).error.max())
    run = MaskedNetwork(ticket).run(x).double()
    with torch.no_grad():
        gap = float((run - ticket.target.forward(x.double())).abs().max())
    words = f"masked network in float32: error {gap:.4g} on {samples} inputs, bound {limit:.4g}"
    claimed = certificate.float32_bound
    within = claimed is not None and limit <= claimed * SLACK
    if not within:
        words += ", claimed " + ("none" if claimed is None else f"{claimed:.4g}")
    return Check("float32 run", within and gap <= limit * SLACK, words)
