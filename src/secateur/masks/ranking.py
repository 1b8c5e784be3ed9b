"""Scores sorted once, so that any number of masks of them costs one comparison each.

``select`` finds one mask; a search wants hundreds of the same scores. A ranking keeps for
every weight its place among those it competes with (its row, matrix, band of columns or group
of M), in as few bytes as that takes, and gives exactly the masks ``select`` would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.masks.selection import band_counts, bands, refuse_nan
from secateur.masks.target import Cut, Scope


@dataclass(frozen=True)
class Ranking:
    """``places`` (d_out, d_in): how many weights of its group go before each one.

    Attributes:
        places: int8, int16 or int32.
        scope: what the groups are, without a pattern.
        group: M of N:M; None for a scope.
    """

    places: Tensor
    scope: Scope
    group: int | None = None

    @classmethod
    def of(
        cls, score: Tensor, scope: Scope, group: int | None = None, name: str = "weight"
    ) -> Ranking:
        """Sort the scores of a matrix (d_out, d_in), ties to the lowest index.

        Raises:
            NumericsError: a score is NaN.
            UsageError: groups of M do not divide the columns.
        """
        refuse_nan(score, name)
        rows, columns = score.shape
        if group is not None:
            if columns % group:
                raise UsageError(
                    f"'{name}' has {columns} inputs, which {group} does not divide",
                    field="sparsity",
                    value=f"N:{group}",
                    fix=f"exclude '{name}', or choose a group size that divides {columns}",
                )
            return cls(_places(score.reshape(-1, group)).view(rows, columns), scope, group)
        if scope.kind == "row":
            return cls(_places(score), scope)
        if scope.kind == "block":
            cut = Cut((rows, columns), 0, scope)
            parts = [_places(score[:, a:b].reshape(1, -1)).view(rows, b - a) for a, b in bands(cut)]
            return cls(torch.cat([part.to(torch.int32) for part in parts], dim=1), scope)
        return cls(_places(score.reshape(1, -1)).view(rows, columns), scope)

    def mask(self, cut: Cut) -> Tensor:
        """``select(score, cut)``: (d_out, d_in) bool, True where the weight goes."""
        if cut.keep is not None and cut.group is not None:
            return self.places < cut.group - cut.keep
        rows = cut.shape[0]
        if self.scope.kind == "row":
            # spread(cut.count, [columns] * rows), a search being in a hurry
            upto = torch.arange(rows + 1, device=self.places.device) * cut.count // max(1, rows)
            return self.places < upto.diff().to(self.places.dtype).unsqueeze(1)
        if self.scope.kind == "block":
            widths = [b - a for a, b in bands(cut)]
            counts = torch.tensor(band_counts(cut), dtype=torch.int32)
            return self.places < counts.repeat_interleave(torch.tensor(widths)).to(self.places)
        return self.places < cut.count


def _places(score: Tensor) -> Tensor:
    """Rank of each entry in its row of ``score`` (groups, n), in the smallest type that holds n."""
    n = score.shape[1]
    order = torch.sort(score, dim=1, stable=True).indices
    limits = ((torch.int8, 2**7), (torch.int16, 2**15), (torch.int32, 2**31))
    dtype = next(kind for kind, limit in limits if n < limit)
    places = torch.empty(score.shape, dtype=dtype, device=score.device)
    count = torch.arange(n, dtype=dtype, device=score.device)
    return places.scatter_(1, order, count.expand(score.shape))
