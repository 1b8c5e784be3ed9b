"""A plan in figures a person reads: per block, per role, and how far it is from uniform."""

from __future__ import annotations

import math
import re
from typing import Any

from secateur.allocation.plan import Plan

_BLOCK = re.compile(r"^(.*?\.)(\d+)(\.|$)")


def block_of(name: str) -> str:
    """The block a matrix lies in, by its name: everything up to the first number."""
    found = _BLOCK.match(name)
    return f"{found[1]}{found[2]}" if found else name


def block_ratios(plan: Plan) -> dict[str, float]:
    """Share of each block's weights that goes, in the plan's order."""
    gone: dict[str, int] = {}
    size: dict[str, int] = {}
    for name, (rows, columns) in plan.shapes.items():
        block = block_of(name)
        gone[block] = gone.get(block, 0) + plan.counts[name]
        size[block] = size.get(block, 0) + rows * columns
    return {block: gone[block] / max(1, size[block]) for block in size}


def role_ratios(plan: Plan) -> dict[str, float]:
    """Share of the weights of matrices whose names end alike (q_proj, down_proj ...)."""
    gone: dict[str, int] = {}
    size: dict[str, int] = {}
    for name, (rows, columns) in plan.shapes.items():
        parts = [p for p in name.split(".") if not p.isdigit()]
        role = parts[-1]
        gone[role] = gone.get(role, 0) + plan.counts[name]
        size[role] = size.get(role, 0) + rows * columns
    return {role: gone[role] / max(1, size[role]) for role in size}


def summary(plan: Plan) -> dict[str, Any]:
    """Block and role ratios, extremes, and the spread around the mean; JSON-able."""
    ratios = list(plan.ratios.values())
    mean = plan.removed / max(1, plan.elements)
    sizes = [rows * columns for rows, columns in plan.shapes.values()]
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
