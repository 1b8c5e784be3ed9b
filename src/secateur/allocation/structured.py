"""How many units every group gives, so that the whole meets a target of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import lcm
from typing import Literal

from secateur.allocation.plan import UnitCut
from secateur.allocation.units import UnitGroup, unit_cuts
from secateur.errors import UsageError
from secateur.models.units import Group

Counted = Literal["ratio", "parameters", "flops"]


def unit_cost(group: Group, kind: Counted, context: int) -> int:
    """What one unit counts towards a target: weights, parameters, or FLOPs of a token."""
    if kind == "ratio":
        return group.weights
    if kind == "parameters":
        return group.parameters
    return round(group.flops((context + 1) / 2))


def lot(group: Group, round_to: int) -> int:
    """Units of the group go in lots of so many."""
    size = round_to if group.kind in ("ffn", "stem") else 1
    return lcm(group.even, size)


def structured_counts(
    groups: Sequence[Group],
    share: float,
    *,
    kind: Counted = "ratio",
    total: float | None = None,
    context: int = 512,
    round_to: int = 1,
    uniform: bool = False,
    at_least: int = 1,
    protect: frozenset[int] = frozenset(),
    ratios: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, UnitCut]:
    """Units to remove from each group.

    Args:
        groups: what may be cut.
        share: how much of ``total`` goes, in [0, 1).
        kind: what is counted.
        total: the whole in that unit; None: all units of the groups that are not protected.
        context: tokens a token attends to, for FLOPs (half of them on average).
        round_to: channels that stay are a multiple of this.
        uniform: like groups (same kind, same size) lose the same number.
        at_least: units that stay in each group.
        protect: blocks left alone.
        ratios, sizes: an allocator's wish and the weights of each matrix; None: all alike.

    Returns:
        Group key -> cut, for every group (0 in protected blocks).

    Raises:
        UsageError: more is asked than can go; widths that do not divide.
    """
    free = {g.key: g for g in groups if g.block is None or g.block not in protect}
    if not free:
        raise UsageError("every block is protected", field="protect", value=sorted(protect))
    costs = {key: unit_cost(g, kind, context) for key, g in free.items()}
    whole = sum(costs[k] * g.n_units for k, g in free.items())
    wanted = share * (whole if total is None else total)
    for group in free.values():
        _divides(group, round_to, at_least)
    most = {k: _most(g, round_to, at_least) for k, g in free.items()}
    ceiling = sum(costs[k] * most[k] for k in free)
    if wanted > ceiling * (1 + 1e-9) and wanted > 0:
        _too_much(free, most, wanted, ceiling, whole if total is None else total, kind)
    if uniform:
        taken = _uniform(free, costs, wanted, round_to, most)
    else:
        names = {k: [k] for k in free}
        if ratios is not None and sizes is not None:
            names = {k: _matrices(g, sizes) or names[k] for k, g in free.items()}
        known = {n: (ratios or {}).get(n, share) for own in names.values() for n in own}
        weights = {n: (sizes or {}).get(n, 1) for own in names.values() for n in own}
        table = {
            k: UnitGroup(
                g.n_units,
                costs[k],
                tuple(names[k]),
                least=g.n_units - most[k],
                multiple=lot(g, round_to),
            )
            for k, g in free.items()
        }
        taken = {
            k: cut.removed for k, cut in unit_cuts(known, weights, table, wanted / whole).items()
        }
    return {
        g.key: UnitCut(g.n_units, taken.get(g.key, 0), unit_cost(g, kind, context)) for g in groups
    }


def largest_share(
    groups: Sequence[Group],
    round_to: int = 1,
    at_least: int = 1,
    protect: frozenset[int] = frozenset(),
) -> float:
    """The most ``structured_counts`` can take of the weights of groups that are not protected."""
    free = [g for g in groups if g.block is None or g.block not in protect]
    whole = sum(g.weights * g.n_units for g in free)
    return sum(g.weights * _most(g, round_to, at_least) for g in free) / max(1, whole)


def solve_share(
    achieved: Callable[[float], float], wanted: float, most: float, steps: int = 12
) -> float:
    """The share up to ``most`` whose ``achieved`` (monotone, measured) is nearest ``wanted``.

    Raises:
        UsageError: even the largest cut does not get there.
    """
    low, high = 0.0, most
    best = (abs(achieved(high) - wanted), high)
    if achieved(high) < wanted:
        raise UsageError(
            f"the largest possible cut saves {achieved(high):.1%}",
            field="sparsity",
            value=wanted,
            fix="ask for less, or let more kinds of units go",
        )
    for _ in range(steps):
        middle = (low + high) / 2
        found = achieved(middle)
        best = min(best, (abs(found - wanted), middle))
        if found < wanted:
            low = middle
        else:
            high = middle
    return best[1]


def _matrices(group: Group, sizes: Mapping[str, int]) -> list[str]:
    found = {part.parameter.removesuffix(".weight") for part in group.slices}
    return sorted(n for n in found if n in sizes)


def _divides(group: Group, round_to: int, at_least: int) -> None:
    size = lot(group, round_to)
    if group.n_units % size:
        what = f"{group.even} key-value groups" if group.even > 1 else f"{round_to}"
        raise UsageError(
            f"'{group.key}' has {group.n_units} units, which {what} does not divide",
            field="round_to",
            value=round_to,
            fix="round_to: 1, or a divisor of the width",
        )
    if group.n_units <= at_least and group.kind == "kv_group" and at_least > 1:
        raise UsageError(
            f"'{group.key}' has only {group.n_units} key-value groups",
            field="at_least",
            value=at_least,
            fix="at_least: 1, or gqa: even",
        )


def _most(group: Group, round_to: int, at_least: int) -> int:
    """The most units that may go: a multiple of the lot, ``at_least`` stay in every run."""
    size = lot(group, round_to)
    least = max(at_least, 1) * group.even
    return max(0, group.n_units - least) // size * size


def _too_much(
    free: Mapping[str, Group],
    most: Mapping[str, int],
    wanted: float,
    ceiling: float,
    total: float,
    kind: str,
) -> None:
    stuck = next((g for k, g in free.items() if most[k] == 0), None)
    hint = f"; '{stuck.key}' has {stuck.n_units} units and keeps them all" if stuck else ""
    raise UsageError(
        f"at most {ceiling / total:.1%} of the {kind} can go without emptying a group{hint}",
        field="sparsity",
        value=round(wanted / total, 6),
        fix="ask for less, let more kinds go, or remove whole layers (kinds: [layer])",
    )


def _uniform(
    free: Mapping[str, Group],
    costs: Mapping[str, int],
    wanted: float,
    round_to: int,
    most: Mapping[str, int],
) -> dict[str, int]:
    """The same count in like groups: coarse kinds first, the finest makes up the difference."""
    alike: dict[tuple[str, int, str, str], list[str]] = {}
    for key, group in free.items():
        alike.setdefault((group.kind, group.n_units, group.stack, group.attention), []).append(key)
    whole = sum(costs[k] * g.n_units for k, g in free.items())
    share, left = wanted / whole, wanted
    rest = whole
    taken: dict[str, int] = {}
    for keys in sorted(
        alike.values(), key=lambda ks: -len(ks) * costs[ks[0]] * lot(free[ks[0]], round_to)
    ):
        first = free[keys[0]]
        size = lot(first, round_to)
        step = len(keys) * costs[keys[0]] * size
        share = left / rest
        count = min(round(share * first.n_units / size), most[keys[0]] // size) * size
        taken |= dict.fromkeys(keys, count)
        left -= count // size * step
        rest -= first.n_units // size * step
        if rest <= 0:
            break
    return taken
