"""Saliency of structural units from the gradients that training computes anyway.

With w a weight and g the gradient of a training step's mean loss, a group G of weights has

    taylor1   sum |w g|            first order, element by element (Molchanov et al., 2019)
    obd       1/2 sum (w g)^2      second order: the diagonal of the Hessian by the empirical
                                   Fisher, E[g^2] (LeCun et al., 1990; Theis et al., 2018)
    vector    |sum w g|            first order, summed before the size is taken: the slope of
                                   the loss when the whole group is scaled down

Every parameter is read once a step and reduced to one number a row and one a column in the
same pass; what is kept between steps are those of the units, never a tensor of the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from secateur.errors import NumericsError, UsageError
from secateur.models.units import Group

Saliency = Literal["taylor1", "obd", "vector"]
SALIENCIES: tuple[str, ...] = get_args(Saliency)

_CHUNK = 1 << 16  # elements worked on at a time on a CPU: what stays in its cache


def line_sums(
    weight: Tensor, gradient: Tensor, kind: Saliency, dims: Iterable[int]
) -> dict[int, Tensor]:
    """Sums of the elements' saliency over all dimensions but one, for each of ``dims``.

    Args:
        weight, gradient: of one shape, one or two dimensions, any floating type.
        kind: what an element counts: |w g|, (w g)^2 / 2, or w g with its sign for ``vector``.

    Returns:
        dimension -> (weight.shape[dim],) float32.

    >>> w, g = torch.ones(2, 3), torch.tensor([[1.0, -2, 3], [0, 0, 1]])
    >>> line_sums(w, g, "taylor1", [0, 1])
    {0: tensor([6., 1.]), 1: tensor([1., 2., 4.])}
    """
    wanted = set(dims)
    if weight.dim() == 1:
        return {0: _element(weight.float() * gradient.float(), kind)} if 0 in wanted else {}
    rows, columns = weight.shape
    step = rows if weight.device.type != "cpu" else max(1, _CHUNK // columns)
    first = weight.new_empty(rows, dtype=torch.float32)
    second = weight.new_zeros(columns, dtype=torch.float32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        product = _element(weight[part].float() * gradient[part].float(), kind)
        if 0 in wanted:
            torch.sum(product, 1, out=first[part])
        if 1 in wanted:
            second += product.sum(0)
    found = {0: first, 1: second}
    return {dim: found[dim] for dim in sorted(wanted)}


def _element(product: Tensor, kind: Saliency) -> Tensor:
    """What one element counts, from w g (worked on in place)."""
    if kind == "taylor1":
        return product.abs_()
    return product if kind == "vector" else product.square_().mul_(0.5)


@dataclass(frozen=True)
class _Member:
    """One parameter's part in a group: which position along ``dim`` belongs to which unit."""

    parameter: nn.Parameter
    name: str
    dim: int
    index: Tensor | None
    width: int

    def units(self, line: Tensor) -> Tensor:
        """(n_units,) from one number a position."""
        if self.index is None:
            return line.view(-1, self.width).sum(1)
        return line[self.index.to(line.device)].sum(1)


def members_of(group: Group, parameters: Mapping[str, nn.Parameter]) -> list[_Member]:
    """A group's parameters, a tied one once."""
    seen: set[tuple[int, int, int]] = set()
    out = []
    for part in group.slices:
        parameter = parameters[part.parameter]
        if parameter.dim() > 2:
            raise UsageError(
                "its saliency is not known for parameters of three dimensions",
                field="model",
                value=part.parameter,
            )
        key = (id(parameter), part.dim, int(part.index.reshape(-1)[0]))
        if key in seen:
            continue
        seen.add(key)
        n, width = part.index.shape
        whole = parameter.shape[part.dim] == n * width and torch.equal(
            part.index.reshape(-1), torch.arange(n * width)
        )
        out.append(
            _Member(parameter, part.parameter, part.dim, None if whole else part.index, width)
        )
    return out


@dataclass
class SaliencySums:
    """Running saliency of every unit of some groups: one vector a group.

    Attributes:
        kind: see the module.
        memory: weight of the past in an exponential average, in [0, 1); None: the plain mean of
            the steps since ``restart``.
        sums: group key -> (n_units,) float64, not yet divided by ``weight``.
        weight: total weight of the steps behind the sums.
    """

    kind: Saliency
    memory: float | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0
    _members: dict[str, list[_Member]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in SALIENCIES:
            raise UsageError(
                "unknown", field="saliency", value=self.kind, fix=f"one of {', '.join(SALIENCIES)}"
            )
        if self.memory is not None and not 0 <= self.memory < 1:
            raise UsageError("must lie in [0, 1)", field="memory", value=self.memory)

    def follow(self, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> None:
        """Look at ``groups`` as they are now; sums of groups that kept their size stay."""
        self._members = {g.key: members_of(g, parameters) for g in groups}
        self.sums = {
            g.key: self.sums.get(g.key, torch.zeros(g.n_units, dtype=torch.float64)) for g in groups
        }
        for group in groups:
            assert self.sums[group.key].shape == (group.n_units,)

    def cut(self, key: str, gone: Tensor) -> None:
        """Forget the units ``gone`` (bool (n_units,)) of a group."""
        self.sums[key] = self.sums[key][~gone.cpu()]

    @torch.no_grad()
    def add(self) -> None:
        """Take in the gradients of one step; parameters without one count nothing."""
        dims: dict[int, set[int]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for members in self._members.values():
            for member in members:
                if member.parameter.grad is not None:
                    dims.setdefault(id(member.parameter), set()).add(member.dim)
                    parameters[id(member.parameter)] = member.parameter
        lines: dict[tuple[int, int], Tensor] = {}
        for number, parameter in parameters.items():
            assert parameter.grad is not None
            found = line_sums(parameter.detach(), parameter.grad, self.kind, dims[number])
            lines |= {(number, dim): line for dim, line in found.items()}
        fade = 1.0 if self.memory is None else self.memory
        self.weight = fade * self.weight + 1.0
        for key, members in self._members.items():
            parts = [m for m in members if (id(m.parameter), m.dim) in lines]
            if fade != 1.0:
                self.sums[key] *= fade
            if parts:
                units = [m.units(lines[id(m.parameter), m.dim]) for m in parts]
                self.sums[key] += torch.stack(units).sum(0).cpu()

    def scores(self) -> dict[str, Tensor]:
        """Group key -> (n_units,) float64, the mean over the steps behind it.

        Raises:
            NumericsError: NaN or infinity, naming the group.
        """
        if self.weight == 0:
            raise ValueError("no step was taken in")
        out = {}
        for key, total in self.sums.items():
            score = total / self.weight
            if not torch.isfinite(score).all():
                raise NumericsError(
                    f"the saliency of '{key}' holds NaN or infinity",
                    fix="a lower learning rate, or precision: no",
                )
            out[key] = score.abs() if self.kind == "vector" else score
        return out

    def restart(self) -> None:
        """Begin a new mean; an exponential average goes on."""
        if self.memory is None:
            self.weight = 0.0
            for total in self.sums.values():
                total.zero_()
