"""Decide + update on one matrix: orderings, exact zeros, faithful error, edge cases."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.evidence.statistics import Evidence, InputMoments
from secateur.masks.target import Cut, Scope, Target
from secateur.methods import methods
from secateur.methods.base import Decision, Method, Need
from secateur.methods.factors import factor_of
from secateur.methods.magnitude import Magnitude
from secateur.methods.prune_matrix import output_error, prune_matrix, shrinkage
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.solvers.least_squares import masked_least_squares_exact
from secateur.testing import example_evidence

UPDATES = ("none", "obs", "exact", "best")


def layer(d_out: int = 48, d_in: int = 96, tokens: int = 800) -> tuple[Tensor, Evidence, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    scales = torch.randn(d_in, generator=generator).exp()
    x = torch.randn(tokens, d_in, generator=generator) @ (mix + 0.5 * torch.eye(d_in)) * scales
    moments = InputMoments(d_in, gram=True)
    moments.update(x)
    return torch.randn(d_out, d_in, generator=generator), Evidence("fc", moments, None, 8), x


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=lambda m: m.name)
@pytest.mark.parametrize("target", ["0.5", "0.7", "2:4"])
def test_each_update_is_better_than_the_one_before(method, target):
    w, evidence, x = layer()
    cut = Cut.of((48, 96), Target.parse(target), method.scope)
    results = {u: prune_matrix(method, w, evidence, cut, u) for u in UPDATES}
    errors = {u: results[u].output_error for u in UPDATES}
    assert errors["none"] > errors["obs"] > errors["exact"] > errors["best"]
    for update, result in results.items():
        assert int(result.mask.sum()) == cut.count
        assert (result.weight[result.mask] == 0).all()
        true = (x @ (w - result.weight).T).norm() / (x @ w.T).norm()
        assert result.output_error == pytest.approx(float(true), rel=1e-3)
        if update != "best":
            assert torch.equal(result.mask, results["none"].mask)
    assert torch.equal(results["none"].weight, w.masked_fill(results["none"].mask, 0))
    assert results["best"].notes["support_moved"] > 0


def test_exact_is_the_optimum():
    w, evidence, _ = layer()
    cut = Cut.of((48, 96), Target.parse(0.5), Scope("row"))
    done = prune_matrix(Wanda(), w, evidence, cut, "exact")
    oracle = masked_least_squares_exact(
        w.double(),
        done.mask,
        evidence.moments().second_moment().double(),
        damping=shrinkage(evidence),
    )
    assert done.output_error <= output_error(w, oracle.float(), evidence) * 1.002


def test_update_defaults_to_the_methods_own():
    w, evidence, _ = layer()
    cut = Cut.of((48, 96), Target.parse(0.5), Scope("block"))
    swept = prune_matrix(SparseGPT(), w, evidence, cut)
    assert torch.equal(swept.weight, prune_matrix(SparseGPT(), w, evidence, cut, "obs").weight)
    assert torch.equal(
        prune_matrix(Wanda(), w, evidence, cut).weight, w * ~swept_mask(w, evidence, cut)
    )


def swept_mask(w: Tensor, evidence: Evidence, cut: Cut) -> Tensor:
    return Wanda().decide(w, evidence, cut).mask


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt", "random", "gblm"])
@pytest.mark.parametrize("update", UPDATES)
def test_an_already_sparse_matrix_stays_sparse(name, update):
    method = methods[name]()
    w, evidence = example_evidence(SparseGPT(), (12, 24))
    evidence.gradients = example_evidence(method, (12, 24))[1].gradients
    zeros = torch.rand(12, 24, generator=torch.Generator().manual_seed(1)) < 0.2
    w = w.masked_fill(zeros, 0)
    cut = Cut.of((12, 24), Target.parse(0.7), Scope("layer"))
    done = prune_matrix(method, w, evidence, cut, update)
    assert done.mask[zeros].all()
    assert int(done.mask.sum()) == cut.count


def test_existing_zeros_can_be_named_or_ignored():
    w, evidence, _ = layer()
    cut = Cut.of((48, 96), Target.parse(0.5), Scope("row"))
    named = torch.zeros(48, 96, dtype=torch.bool)
    named[:, :10] = True
    assert prune_matrix(Wanda(), w, evidence, cut, existing_zeros=named).mask[named].all()
    plain = prune_matrix(Wanda(), w, evidence, cut, existing_zeros=torch.zeros_like(named))
    assert not plain.mask[named].all()


def test_more_zeros_than_asked_for_still_gives_the_count():
    w, evidence, _ = layer()
    w[:, :80] = 0
    cut = Cut.of((48, 96), Target.parse(0.5), Scope("row"))
    done = prune_matrix(Wanda(), w, evidence, cut, "none")
    assert int(done.mask.sum()) == cut.count
    assert torch.equal(done.weight, w)  # nothing but zeros went


@pytest.mark.parametrize("update", UPDATES)
def test_nothing_asked_nothing_changed(update):
    w, evidence, _ = layer()
    done = prune_matrix(SparseGPT(), w, evidence, Cut((48, 96), 0, Scope("block")), update)
    assert torch.equal(done.weight, w)
    assert not done.mask.any()
    assert done.output_error == 0


def test_magnitude_needs_no_evidence_and_claims_no_error():
    w = torch.randn(4, 8)
    cut = Cut.of((4, 8), Target.parse(0.5), Scope("layer"))
    done = prune_matrix(Magnitude(), w, Evidence("fc"), cut)
    assert done.output_error is None
    diagonal = InputMoments(8)
    diagonal.update(torch.randn(5, 8))
    assert prune_matrix(Wanda(), w, Evidence("fc", diagonal), cut).output_error is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    w, evidence, _ = layer()
    cut = Cut.of((48, 96), Target.parse("2:4"), Scope("row"))
    for update in UPDATES:
        done = prune_matrix(SparseGPT(), w.to(dtype), evidence, cut, update)
        assert done.weight.dtype == dtype
        assert int(done.mask.sum()) == cut.count


def test_values_too_small_for_half_precision_are_not_mistaken_for_pruned():
    w = torch.full((2, 4), 1e-7, dtype=torch.float16)
    cut = Cut.of((2, 4), Target.parse(0.5), Scope("row"))
    done = prune_matrix(Magnitude(), w, Evidence("fc"), cut)
    assert int(done.mask.sum()) == 4


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("update", UPDATES)
def test_one_input_one_token_and_constant_columns(columns, update):
    w = torch.randn(5, columns)
    moments = InputMoments(columns, gram=True)
    moments.update(torch.ones(1, columns))
    cut = Cut.of((5, columns), Target.parse(0.4), Scope("layer"))
    done = prune_matrix(SparseGPT(), w, Evidence("fc", moments), cut, update)
    assert int(done.mask.sum()) == cut.count
    assert torch.isfinite(done.weight).all()


@pytest.mark.parametrize("update", UPDATES)
def test_dead_inputs_are_pruned_first(update):
    w, evidence, _ = layer()
    gram = evidence.moments().gram
    assert gram is not None
    gram[:, 5] = gram[5] = 0
    cut = Cut.of((48, 96), Target.parse(0.3), Scope("block"))
    assert prune_matrix(SparseGPT(), w, evidence, cut, update).mask[:, 5].all()


def test_refusals_name_the_module():
    w, evidence, _ = layer()
    cut = Cut.of((48, 96), Target.parse(0.5), Scope("row"))
    with pytest.raises(UsageError, match="update"):
        prune_matrix(Wanda(), w, evidence, cut, "better")
    broken = w.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="'fc'"):
        prune_matrix(Magnitude(), broken, evidence, cut)
    empty = Evidence("experts.3", InputMoments(96, gram=True))
    with pytest.raises(NumericsError, match=r"no calibration token reached 'experts\.3'"):
        prune_matrix(Wanda(), w, empty, cut)
    loud = InputMoments(96, gram=True)
    loud.update(torch.full((3, 96), float("inf")))
    with pytest.raises(NumericsError, match="'up'"):
        prune_matrix(SparseGPT(), w, Evidence("up", loud), cut)


def test_overflow_on_the_way_back_to_half_precision_is_an_error():
    w = torch.tensor([[60000.0, 60000.0]], dtype=torch.float16)
    moments = InputMoments(2, gram=True)
    moments.update(torch.ones(4, 2))
    cut = Cut((1, 2), 1, Scope("row"))
    with pytest.raises(NumericsError, match="not finite"):
        prune_matrix(Wanda(), w, Evidence("fc", moments), cut, "exact")


def test_modules_that_share_an_input_share_its_factor():
    _, evidence, _ = layer()
    twin = Evidence("k", evidence.inputs, None, 8)
    assert factor_of(evidence, 0.01) is factor_of(twin, 0.01)
    assert factor_of(evidence, 0.02) is not factor_of(evidence, 0.01)
    before = factor_of(evidence, 0.01)
    evidence.moments().update(torch.randn(3, 96))
    assert factor_of(evidence, 0.01) is not before


def test_a_factor_goes_with_its_moments():
    _, evidence, _ = layer()
    factor = weakref.ref(factor_of(evidence, 0.01))
    assert factor() is not None
    del evidence
    gc.collect()
    assert factor() is None


def test_damping_that_had_to_grow_is_noted():
    w, evidence, _ = layer()
    cut = Cut.of((48, 96), Target.parse(0.5), Scope("block"))
    for update in ("none", "obs"):
        assert prune_matrix(SparseGPT(), w, evidence, cut, update).notes == {"damping": 0.01}
    few = InputMoments(96, gram=True)
    few.update(torch.randn(3, 96, generator=torch.Generator().manual_seed(1)))
    few.gram -= 0.01 * few.gram.diagonal().mean() * torch.eye(96)  # as rounding would
    notes = prune_matrix(SparseGPT(damping=1e-4), w, Evidence("fc", few), cut).notes
    assert notes["damping"] > notes["damping_asked"] == 1e-4


@dataclass(frozen=True)
class OldStyle(Method):
    """A plug-in whose ``decide`` knows nothing of existing zeros."""

    name = "old"
    summary = "first half of the columns"
    needs = frozenset[Need]()

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return torch.arange(weight.shape[1]).expand(weight.shape).float()

    def decide(self, weight: Tensor, evidence: Evidence, cut: Cut) -> Decision:  # type: ignore[override]
        return super().decide(weight, evidence, cut)


def test_a_plug_in_without_existing_zeros():
    w = torch.randn(4, 8)
    w[0, 7] = 0
    cut = Cut.of((4, 8), Target.parse(0.5), Scope("row"))
    assert prune_matrix(OldStyle(), w, Evidence("fc"), cut).mask[:, :4].all()


@pytest.mark.parametrize("d_in", [1, 255, 256, 257, 600])
def test_output_error_from_half_of_the_moments(d_in):
    w, evidence, x = layer(d_out=9, d_in=d_in)
    pruned = w * (w.abs() > 0.5)
    true = torch.linalg.norm(x.double() @ (w - pruned).T.double())
    true = true / torch.linalg.norm(x.double() @ w.T.double())
    assert output_error(w, pruned, evidence) == pytest.approx(float(true), rel=1e-4)
