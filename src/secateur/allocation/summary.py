"""A plan in figures a person reads: per block, per role, and how far it is from uniform."""

from __future__ import annotations

import math
import re
from typing import Any

from secateur.allocation.plan import Plan

_BLOCK = re.compile(r"^(.*?\.)(\d+)([.:]|$)")


def block_of(name: str) -> str:
    """The block a matrix lies in, by its name: everything up to the first number."""
    found = _BLOCK.match(name)
    return f"{found[1]}{found[2]}" if found else name.partition(":")[0]


def block_ratios(plan: Plan) -> dict[str, float]:
    """Share of each block's weights that goes, in the plan's order (of its units, if it has any)."""
    gone: dict[str, int] = {}
    size: dict[str, int] = {}
    for name, whole, removed in _parts(plan):
        block = block_of(name)
        gone[block] = gone.get(block, 0) + removed
        size[block] = size.get(block, 0) + whole
    return {block: gone[block] / max(1, size[block]) for block in size}


def _parts(plan: Plan) -> list[tuple[str, int, int]]:
    """(name, weights, weights that go) of every matrix, or of every group of units."""
    if plan.units:
        return [(n, u.of * u.weights, u.removed * u.weights) for n, u in plan.units.items()]
    return [(n, r * c, plan.counts[n]) for n, (r, c) in plan.shapes.items()]


def role_ratios(plan: Plan) -> dict[str, float]:
    """Share of the weights of what is named alike (q_proj, down_proj, heads ...)."""
    gone: dict[str, int] = {}
    size: dict[str, int] = {}
    for name, whole, removed in _parts(plan):
        role = [p for p in re.split("[.:]", name) if not p.isdigit()][-1]
        gone[role] = gone.get(role, 0) + removed
        size[role] = size.get(role, 0) + whole
    return {role: gone[role] / max(1, size[role]) for role in size}


def summary(plan: Plan) -> dict[str, Any]:
    """Block and role ratios, extremes, and the spread around the mean; JSON-able."""
    parts = _parts(plan)
    sizes = [whole for _, whole, _ in parts]
    ratios = [removed / max(1, whole) for _, whole, removed in parts]
    mean = sum(removed for *_, removed in parts) / max(1, sum(sizes))
    square = sum(p * (r - mean) ** 2 for p, r in zip(sizes, ratios, strict=True))
    return {
        "allocator": str(plan.provenance.get("allocator", "?")),
        "provenance": plan.provenance,
        "target": str(plan.target),
        "achieved": mean,
        "blocks": block_ratios(plan),
        "roles": role_ratios(plan),
        "lowest": min(ratios, default=0.0),
        "highest": max(ratios, default=0.0),
        "spread": math.sqrt(square / max(1, sum(sizes))),
        "units": {
            name: {"of": u.of, "removed": u.removed, "weights": u.weights}
            for name, u in plan.units.items()
        },
    }
