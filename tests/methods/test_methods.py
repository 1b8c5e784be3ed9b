"""Each method's score and mask against its formula, and the identities that tie them together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from secateur.errors import NumericsError, UsageError
from secateur.evidence.statistics import Evidence, GradientMoments, InputMoments
from secateur.masks.selection import select_reference
from secateur.masks.target import Cut, Scope, Target
from secateur.methods import methods
from secateur.methods.base import Method, Need
from secateur.methods.gblm import GBLM, Gradient
from secateur.methods.magnitude import Magnitude, Random
from secateur.methods.ria import RIA
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.testing import check_method


def known(
    d_out: int = 12,
    d_in: int = 32,
    sequences: int = 4,
    length: int = 64,
    seed: int = 0,
    gram: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Evidence, Tensor, Tensor]:
    """A weight, its evidence, and the inputs (T, d_in) and gradients (N, d_out, d_in) behind it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    mix = torch.randn(d_in, d_in, generator=generator) / d_in**0.5 + torch.eye(d_in)
    x = torch.randn(sequences * length, d_in, generator=generator) @ mix * scale
    gradients = torch.randn(sequences, d_out, d_in, generator=generator) * 1e-3
    moments = InputMoments(d_in, gram=gram)
    for part in x.split(length):
        moments.update(part)
    sums = GradientMoments(("l1", "l2", "signed"))
    for gradient in gradients:
        sums.update(gradient)
    return weight, Evidence("fc", moments, sums, sequences), x, gradients


HALF = Cut.of((12, 32), Target.parse(0.5), Scope("row"))


WEIGHT_METHODS = [name for name in methods.names() if issubclass(methods[name], Method)]


@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_contract(name):
    check_method(methods[name]())


@pytest.mark.parametrize(
    "method",
    [Wanda(variant=True), GBLM(norm="l2"), GBLM(alpha=0), Gradient(norm="signed"), RIA(a=0)],
    ids=str,
)
def test_contract_of_options(method):
    check_method(method)


# --- formulas --------------------------------------------------------------------------------


def test_scores_are_the_formulas():
    w, evidence, x, g = known()
    norm = x.square().mean(0).sqrt()
    size = w.abs()
    close = torch.testing.assert_close
    close(Magnitude().score(w, evidence), size)
    close(Wanda().score(w, evidence), size * norm)
    close(Gradient().score(w, evidence), size * g.abs().sum(0))
    close(Gradient(norm="l2").score(w, evidence), size * g.norm(dim=0))
    close(Gradient(norm="signed").score(w, evidence), size * g.sum(0).abs())
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    close(RIA().score(w, evidence), relative * norm**0.5)
    gblm = GBLM(normalize="reference").score(w, evidence)
    per_sequence = (x.square().sum(0) / 4).sqrt()
    close(gblm, size * (per_sequence + 100 * g.abs().sum(0)))
    h = x.T.double() @ x.double() / len(x)
    h += 0.01 * h.diagonal().mean() * torch.eye(32)
    close(
        SparseGPT().score(w, evidence).double(),
        w.double().square() / torch.linalg.inv(h).diagonal(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_wanda_is_the_best_mask_if_inputs_were_orthogonal():
    """Brute force over all supports of a row of ten: least (sum of) squared output error."""
    generator = torch.Generator().manual_seed(1)
    x = torch.linalg.qr(torch.randn(40, 10, generator=generator)).Q
    x = x * torch.rand(10, generator=generator)
    moments = InputMoments(10, gram=True)
    moments.update(x)
    w = torch.randn(3, 10, generator=generator)
    cut = Cut.of((3, 10), Target.parse(0.5), Scope("row"))
    mask = Wanda().decide(w, Evidence("fc", moments), cut).mask
    for row in range(3):
        costs = {}
        for gone in itertools.combinations(range(10), 5):
            removed = torch.zeros(10)
            removed[list(gone)] = w[row, list(gone)]
            costs[gone] = float((x @ removed).square().sum())
        best = min(costs, key=costs.__getitem__)
        assert tuple(mask[row].nonzero().squeeze(1).tolist()) == best


def test_wanda_ignores_row_and_input_scale():
    w, evidence, *_ = known()
    mask = Wanda().decide(w, evidence, HALF).mask
    rows = torch.rand(12, 1) * 10 + 0.1
    assert torch.equal(Wanda().decide(w * rows, evidence, HALF).mask, mask)
    louder = known(scale=8.0)[1]
    assert torch.equal(Wanda().decide(w, louder, HALF).mask, mask)


def test_gblm_sees_input_scale_and_magnitude_sees_row_scale():
    w, evidence, *_ = known()
    louder = known(scale=64.0)[1]
    masks = [GBLM().decide(w, e, HALF).mask for e in (evidence, louder)]
    assert not torch.equal(*masks)
    layer = Cut.of((12, 32), Target.parse(0.5), Scope("layer"))
    rows = torch.linspace(0.1, 10, 12)[:, None]
    before, after = (Magnitude().decide(v, evidence, layer).mask for v in (w, w * rows))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("normalize", ["mean", "reference"])
def test_gblm_between_wanda_and_gradient(normalize):
    w, evidence, *_ = known()
    wanda = Wanda().decide(w, evidence, HALF).mask
    gradient = Gradient().decide(w, evidence, HALF).mask
    tiny, huge = (
        GBLM(alpha=alpha, normalize=normalize).decide(w, evidence, HALF).mask
        for alpha in (0.0, 1e12)
    )
    assert torch.equal(tiny, wanda)
    assert torch.equal(huge, gradient)
    assert not torch.equal(wanda, gradient)


def test_gblm_without_alpha_needs_no_gradient():
    assert not any(need.startswith("grad") for need in GBLM(alpha=0).requirements())
    assert "grad-l2" in GBLM(norm="l2").requirements()


def test_norms_across_samples():
    _, one, *_ = known(sequences=1)
    torch.testing.assert_close(one.gradient("l1"), one.gradient("l2"))
    _, many, *_ = known(sequences=9)
    assert (many.gradient("l1") >= many.gradient("l2") - 1e-9).all()
    assert (many.gradient("l2") >= many.gradient("signed") / 3 - 1e-9).all()


def tuned_evidence(sequences: int, length: int, norm_of_x: float = 1.0) -> Evidence:
    """Evidence as if so many sequences had been seen; gradients shrink as 1 / sqrt(length)."""
    generator = torch.Generator().manual_seed(3)
    moments = InputMoments(16)
    moments.tokens = sequences * length
    moments.diagonal = (torch.rand(16, generator=generator) + 0.5) * moments.tokens * norm_of_x
    sums = GradientMoments(("l1", "l2"))
    typical = torch.rand(6, 16, generator=generator) * 1e-2 * (2048 / length) ** 0.5
    sums.samples = sequences
    sums.sums = {"l1": typical * sequences, "l2": typical.square() * sequences}
    return Evidence("fc", moments, sums, sequences)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gblm_means_keep_the_authors_balance(norm):
    """At N = 128, L = 2048 both normalisations rank alike; elsewhere only "mean" stays put."""
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    tuned = GBLM(norm=norm, normalize="reference").score(w, tuned_evidence(128, 2048))
    for sequences, length in [(128, 2048), (8, 2048), (16, 512), (1000, 64)]:
        score = GBLM(norm=norm).score(w, tuned_evidence(sequences, length))
        torch.testing.assert_close(score * 2048**0.5, tuned, rtol=1e-5, atol=0)
    elsewhere = GBLM(norm=norm, normalize="reference").score(w, tuned_evidence(8, 2048))
    assert not torch.allclose(elsewhere / elsewhere.sum(), tuned / tuned.sum(), rtol=1e-2)


def test_random_depends_on_seed_and_name_only():
    w, evidence, *_ = known()
    other = Evidence("fc2")
    first = Random().score(w, evidence)
    assert torch.equal(first, Random().score(w * 2, evidence))
    assert not torch.equal(first, Random(seed=1).score(w, evidence))
    assert not torch.equal(first, Random().score(w, other))


def test_sparsegpt_with_uncorrelated_inputs_is_squared_wanda():
    w = torch.randn(10, 32, generator=torch.Generator().manual_seed(5))
    moments = InputMoments(32, gram=True)
    moments.update(torch.diag(torch.rand(32) + 0.1))
    evidence = Evidence("fc", moments)
    cut = Cut.of((10, 32), Target.parse(0.5), Scope("block", 32))
    decision = SparseGPT(damping=0.0).decide(w, evidence, cut)
    assert torch.equal(decision.mask, Wanda().decide(w, evidence, cut).mask)
    assert decision.weight is not None
    torch.testing.assert_close(decision.weight, w.masked_fill(decision.mask, 0))


# --- the originals ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude", "wanda", "gblm", "gradient", "ria"])
@pytest.mark.parametrize("target", ["0.6", "2:4"])
def test_reference_masks_of_score_methods(name, target):
    w, evidence, x, _ = known()
    method = methods[name](compat="reference")
    assert method.inexact
    cut = Cut.of((12, 32), Target.parse(target), method.scope)
    decision = method.decide(w, evidence, cut)
    assert decision.score is not None
    assert torch.equal(decision.mask, select_reference(decision.score, cut))
    if name == "wanda":
        expected = w.abs() * (x.square().sum(0) / 4).sqrt()
        torch.testing.assert_close(decision.score, expected)
    if target == "0.6" and str(method.scope) == "row":
        assert (decision.mask.sum(1) == int(32 * 0.6)).all()


def test_reference_sparsegpt_takes_one_too_many_a_block():
    w, evidence, *_ = known(d_in=64)
    cut = Cut.of((12, 64), Target.parse(0.5), Scope("block", 32))
    ours = SparseGPT().decide(w, evidence, cut).mask
    theirs = SparseGPT(compat="reference").decide(w, evidence, cut).mask
    assert int(ours.sum()) == cut.count
    assert int(theirs.sum()) == cut.count + 2
    assert (ours != theirs).float().mean() < 0.05


def test_wanda_variant_spends_rows_unequally():
    w, evidence, *_ = known(d_in=256)
    w[0] *= torch.rand(256) ** 4
    cut = Cut.of((12, 256), Target.parse(0.5), Scope("row"))
    mask = Wanda(variant=True).decide(w, evidence, cut).mask
    assert int(mask.sum()) == cut.count
    assert int(mask[0].sum()) > int(mask[1:].sum(1).max())
    theirs = Wanda(variant=True, compat="reference").decide(w, evidence, cut).mask
    assert (mask != theirs).float().mean() < 5e-3
    pattern = Cut.of((12, 256), Target.parse("2:4"), Scope("row"))
    masks = [Wanda(variant=v).decide(w, evidence, pattern).mask for v in (False, True)]
    assert torch.equal(*masks)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("wanda", {"compat": "exact"}, "compat"),
        ("wanda", {"varriant": True}, "varriant"),
        ("gblm", {"norm": "l3"}, "norm"),
        ("gblm", {"normalize": "max"}, "normalize"),
        ("gblm", {"alpha": -1}, "alpha"),
        ("gblm", {"alpha": float("nan")}, "alpha"),
        ("gradient", {"norm": "L1"}, "norm"),
        ("ria", {"a": -0.5}, "a"),
        ("sparsegpt", {"damping": 2.0}, "damping"),
        ("sparsegpt", {"block_size": 0}, "block_size"),
        ("gblm", {"alpha": "abc"}, "alpha"),
        ("sparsegpt", {"damping": "x"}, "damping"),
        ("sparsegpt", {"block_size": 1.5}, "block_size"),
        ("wanda", {"variant": "maybe"}, "variant"),
    ],
)
def test_options_are_checked(name, options, field):
    with pytest.raises(UsageError, match=field) as caught:
        methods[name].with_options(options)
    assert caught.value.field == field


def test_options_that_fit_their_type_are_taken():
    # YAML reads 1e3 (no point) as text
    assert methods["gblm"].with_options({"alpha": "1e3", "norm": "l2"}) == GBLM(1000.0, "l2")


def test_nan_in_the_evidence_names_the_module():
    w, evidence, *_ = known()
    evidence.moments().diagonal = evidence.moments().diagonal * float("nan")
    with pytest.raises(NumericsError, match="'fc'"):
        Wanda().decide(w, evidence, HALF)


def test_all_zero_rows_and_columns_have_finite_scores():
    w, evidence, *_ = known()
    w[3] = 0
    w[:, 7] = 0
    for name in WEIGHT_METHODS:
        assert torch.isfinite(methods[name]().score(w, evidence)).all(), name


@dataclass(frozen=True)
class Undeclared(Method):
    """Reads evidence that it did not ask for."""

    name = "undeclared"
    summary = "|W| times what is not there"
    needs = frozenset({Need.INPUTS, Need.GRAD_L1})

    read: str = "gram"

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        if self.read == "gram":
            return weight.abs() * evidence.moments().second_moment().diagonal()
        return weight.abs() * evidence.gradient(self.read)


@dataclass(frozen=True)
class Forgetful(Method):
    """Ranks afresh each time, so what has gone already does not go first."""

    name = "forgetful"
    summary = "the largest weights go"

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return -weight.abs()

    def decide(self, weight, evidence, cut, gone=None):
        return super().decide(weight, evidence, cut)


def test_the_contract_kit_finds_breaches():
    check_method(Undeclared("l1"))
    with pytest.raises(ValueError, match="only the diagonal"):
        check_method(Undeclared("gram"))
    with pytest.raises(KeyError, match="l2"):
        check_method(Undeclared("l2"))
    with pytest.raises(AssertionError, match="pruned again"):
        check_method(Forgetful())
