"""Re-checking a ticket's file: everything is recomputed from the seed and the bits.

Nothing in the file is believed but the claim itself. The random weights are regenerated, the
network is folded, bounded and run again, and each claim is compared with what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import VerificationError
from secateur.lottery.certificate import FLOAT32, Certificate, attained, bound_error
from secateur.lottery.folded import FoldedNetwork
from secateur.lottery.intervals import propagate
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
        checks.append(_float32_run(ticket, folded, samples))
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
    bound = float(bound_error(folded, ticket.box, claimed.method).max())
    checks = [
        Check(
            "bound",
            bound <= claimed.bound * SLACK,
            f"recomputed {bound:.6g} ({claimed.method}), claimed {claimed.bound:.6g}",
        )
    ]
    if ticket.eps is not None:
        words = f"bound {bound:.4g}, asked {ticket.eps:.4g}"
        checks.append(Check("epsilon", bound <= ticket.eps * SLACK, words))
    witness = claimed.witness
    if witness is not None:
        inside = bool(((witness >= ticket.box.low) & (witness <= ticket.box.high)).all())
        value = attained(folded, witness)
        agrees = abs(value - claimed.empirical) <= 1e-9 * (1 + claimed.empirical)
        words = f"error {value:.6g} at the witness, claimed {claimed.empirical:.6g}"
        checks.append(Check("witness", inside and agrees and value <= bound * SLACK, words))
    return checks


def _float32_run(ticket: Ticket, folded: FoldedNetwork, samples: int) -> Check:
    """The masked network itself, in float32, stays within its own proved bound of the target."""
    x = points(ticket.seed, samples, ticket.box.low, ticket.box.high).float()
    limit = float(propagate(folded, ticket.box, FLOAT32).error.max())
    run = MaskedNetwork(ticket).run(x).double()
    with torch.no_grad():
        gap = float((run - ticket.target.forward(x.double())).abs().max())
    words = f"masked network in float32: error {gap:.4g} on {samples} inputs, bound {limit:.4g}"
    return Check("float32 run", gap <= limit * SLACK, words)
