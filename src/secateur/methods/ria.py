"""RIA: relative importance, so that no whole channel is lost, and activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import UsageError
from secateur.evidence.statistics import Evidence
from secateur.masks.target import Scope
from secateur.methods.base import Need, Published
from secateur.methods.wanda import input_norm


@dataclass(frozen=True)
class RIA(Published):
    """S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a, no update.

    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models", ICLR 2024. Dividing by the sums over the weight's input and output
    channel keeps small channels alive. Compared within a matrix, as in the authors' code.

    Attributes:
        a: exponent of the input norm; 0 gives relative importance alone.
    """

    name = "ria"
    summary = "relative importance within row and column times ||x||^a; no update"
    paper = "Zhang et al. 2024 (ICLR)"
    needs = frozenset({Need.INPUTS})
    scope = Scope("layer")

    a: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.a < float("inf"):
            raise UsageError("an exponent >= 0", field="a", value=self.a, fix="e.g. 0.5")

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """The relative importance times activations, (d_out, d_in)."""
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny  # an all-zero channel has score 0, not 0 / 0
        per_input = size / size.sum(0).clamp_min(tiny)
        per_output = size / size.sum(1, keepdim=True).clamp_min(tiny)
        sequences = evidence.sequences if self.compat == "reference" else 0
        return (per_input + per_output) * input_norm(evidence.moments(), sequences) ** self.a
