"""SlimGPT: heads and MLP channels by structured Optimal Brain Surgeon, survivors repaired.

    cost of a head j:     sum_t ||W_:t||^2 / (L_j)_tt^2 ,   B_jj = L_j L_j^T,   B = (X X^T)^-1
    cost of a channel t:  ||W_:t||^2 / B_tt

W reads the units: the attention's output projection, or the MLP's down projection. The block
is measured as the blocks before it have been left, heads go first, and the channels are
chosen on what the cut attention delivers (Ling, Wang and Liu, NeurIPS 2024, equations 4-6).
The solver is ``solvers.structured_obs``; how much each block gives is the allocation's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.errors import UsageError
from secateur.methods.base import one_of
from secateur.methods.structured_base import StructuredMethod, UnitDecision, UnitProblem
from secateur.solvers.groups import HEAD_SCORES, centred
from secateur.solvers.schedules import batch_sizes
from secateur.solvers.structured_obs import remove_groups


@dataclass(frozen=True)
class SlimGPT(StructuredMethod):
    """Structured OBS over heads (whole key-value groups) and MLP channels.

    Attributes:
        head_score: what a head costs: ``slimgpt``, with the inverse's diagonal as it evolves while
            the head is eliminated; ``exact``, the joint cost of all its columns; ``initial_diag``,
            the diagonal before (the paper's ablation).
        group_size: channels per round: a number, ``FIRST:LAST``, a share ``1/N`` of what is still to
            go, or ``published`` (see ``solvers.schedules``). Heads go one by one.
        damping: added to the diagonal of H, relative to its mean; raised where it must be.
        compensate: refit the survivors by least squares; without it they stay as they were.
        bias: where the reading matrix has one, let it take over the mean of what is removed.
        local_search: rounds of exchanging removed for kept units afterwards (OSSCAR), 0 for none.
    """

    name = "slimgpt"
    summary = "heads and MLP channels by structured OBS, survivors refitted"
    paper = "Ling, Wang, Liu 2024, arXiv:2412.18110"
    driver = "blocks"
    kinds = frozenset({"head", "kv_group", "ffn"})

    head_score: Literal["slimgpt", "exact", "initial_diag"] = "slimgpt"
    group_size: int | str = "1/32"
    damping: float = 0.01
    compensate: bool = True
    bias: bool = True
    local_search: int = 0

    def __post_init__(self) -> None:
        one_of("head_score", self.head_score, HEAD_SCORES)
        batch_sizes(1, self.group_size)
        if not 0 <= self.damping <= 1:
            raise UsageError("a share in [0, 1]", field="damping", value=self.damping)
        if self.local_search < 0:
            raise UsageError("a number of rounds", field="local_search", value=self.local_search)

    def decide(self, problem: UnitProblem) -> UnitDecision:
        """Eliminate the cheapest units of one group and refit the matrix that reads them."""
        already = int(problem.gone.sum())
        count = problem.count - already
        single = problem.columns.shape[1] == 1
        rounds = batch_sizes(count, self.group_size if single else 1)
        moment = problem.moments.second_moment()
        bias = problem.bias if self.bias and self.compensate else None
        if bias is not None:
            moment = centred(moment, problem.moments.mean())
        removal = remove_groups(
            problem.weight,
            moment,
            problem.columns,
            rounds,
            score=self.head_score,
            update="exact" if self.compensate else "none",
            damping=self.damping,
            swaps=self.local_search,
            first=problem.gone if already else None,
            even=problem.even,
            name=problem.name,
            tokens=problem.moments.tokens,
        )
        if bias is not None:
            change = (problem.weight - removal.weight).double()
            bias = (bias.double() + change @ problem.moments.mean().double()).float()
        gone = removal.gone[problem.columns[:, 0].to(removal.gone.device)].cpu()
        return UnitDecision(
            gone,
            removal.weight if self.compensate else None,
            removal.scores.float().cpu(),
            {**removal.notes, "error": removal.error},
            bias,
        )
