"""The mixed masks: rows sum to N, gradients are right, the fused form says what torch says."""

import shutil

import pytest
import torch

from secateur.kernels import _candidate_compiled, candidate_mix
from secateur.kernels.candidate_mix import (
    CandidateMix,
    Draw,
    gumbel,
    key_of,
    likeliest,
    probabilities,
)
from secateur.kernels.soft_top import SoftTop, relaxed_top

PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 2)]
DRAWS = [Draw(key_of(1, 2), 100.0, 4.0), Draw(key_of(9), 500.0, 0.05), Draw(None, 100.0, 1.0)]


@pytest.fixture
def torch_only(monkeypatch):
    monkeypatch.setattr(candidate_mix, "_compiled", lambda: None)


def case(mix, groups=700, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups, mix.logits_per_group, generator=generator) * 0.01
    weight = torch.randn(groups, mix.group, generator=generator)
    return weight, logits, torch.randn(groups, mix.group, generator=generator)


def some_of(keep, group, count, groups=700, seed=0):
    """A choice among the ``count`` patterns nearest to the largest weights."""
    weight = torch.randn(groups, group, generator=torch.Generator().manual_seed(seed + 1))
    mask = torch.ones(groups, group, dtype=torch.bool)
    mask.scatter_(-1, weight.abs().topk(keep).indices, False)
    return CandidateMix(keep, group, likeliest(keep, group, weight, mask, count)), weight, mask


CHOICES = [(2, 4, 4), (2, 4, 6), (4, 8, 8), (2, 16, 5)]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_likeliest_patterns_are_ranked_by_overlap_then_by_size(choice):
    mix, weight, mask = some_of(*choice)
    assert mix.index.dtype is torch.uint8
    chosen = mix.patterns[mix.index.long()]
    assert torch.equal(chosen[:, 0], ~mask)
    for own, w, gone, number in zip(chosen[:50], weight, mask, mix.index.long(), strict=False):

        def rank(pattern, w=w, gone=gone):
            return int((pattern & ~gone).sum()), float(w[pattern].double().abs().sum())

        every = sorted(((rank(p), -i) for i, p in enumerate(mix.patterns)), reverse=True)
        assert [rank(p) for p in own] == [r for r, _ in every[: len(own)]]
        assert len(set(number.tolist())) == len(own)


def test_equal_patterns_are_ranked_by_number_whatever_the_chunk(monkeypatch):
    weight = torch.ones(9, 8, dtype=torch.bfloat16)
    mask = torch.tensor([False] * 4 + [True] * 4).repeat(9, 1)
    whole = likeliest(4, 8, weight, mask, 20)
    assert whole[0, 1:17].tolist() == sorted(whole[0, 1:17].tolist())
    monkeypatch.setattr(candidate_mix, "_CHUNK", 100)
    assert torch.equal(likeliest(4, 8, weight, mask, 20), whole)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_choice_is_all_patterns_with_the_others_ruled_out(choice, draw, compiled, monkeypatch):
    if compiled:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(candidate_mix, "_compiled", lambda: None)
        monkeypatch.setattr(candidate_mix, "_CHUNK", 9999)
    mix, _, mask = some_of(*choice)
    weight, logits, grad = case(mix)
    ours = mix.masked(weight, logits, draw), *mix.backward(weight, logits, grad, -0.3, draw)
    # All patterns, with the noise of the slots put into the logits: of one and the same draw.
    scores = logits.clone()
    if draw.key is not None:
        scores += gumbel(0, tuple(logits.shape), draw.key) / draw.kappa
    number = mix.index.long()
    full = CandidateMix(*choice[:2])
    all_logits = torch.full((len(logits), full.logits_per_group), float("-inf"))
    all_logits.scatter_(-1, number, scores)
    still = Draw(None, draw.kappa, draw.tau)
    monkeypatch.setattr(candidate_mix, "_compiled", lambda: None)
    d_all, masked = full.backward(weight, all_logits, grad, -0.3, still)
    for got, wanted in zip(ours, (masked, d_all.gather(-1, number), masked), strict=True):
        assert float((got - wanted).abs().max()) <= 2e-4 * float(wanted.abs().max())
    assert torch.allclose(mix.prior(mask), full.prior(mask).gather(-1, number))
    kept = full.choose(torch.full_like(all_logits, -1e9).scatter(-1, number, logits))
    assert torch.equal(mix.choose(logits), kept)


@pytest.mark.parametrize("kind", [CandidateMix, SoftTop])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("draw", DRAWS)
def test_rows_sum_to_n(kind, pattern, draw):
    mix = kind(*pattern)
    _, logits, _ = case(mix)
    mask = mix.masked(torch.ones(len(logits), mix.group), logits, draw)
    assert torch.allclose(mask.sum(-1), torch.full((len(logits),), float(mix.keep)), atol=1e-4)
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1 + 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("draw", DRAWS)
def test_fused_and_plain_forms_agree(pattern, draw, monkeypatch):
    pytest.importorskip("numba")
    mix = CandidateMix(*pattern)
    weight, logits, grad = case(mix, 1500)
    fused = mix.masked(weight, logits, draw), *mix.backward(weight, logits, grad, -0.3, draw)
    monkeypatch.setattr(candidate_mix, "_compiled", lambda: None)
    plain = mix.masked(weight, logits, draw), *mix.backward(weight, logits, grad, -0.3, draw)
    for ours, theirs in zip(fused, plain, strict=True):
        assert float((ours - theirs).abs().max()) <= 3e-5 * float(theirs.abs().max())


@pytest.mark.slow
def test_generated_and_plain_forms_agree(torch_only, monkeypatch):
    # Made for GPUs; the same functions compiled for the CPU say whether they are right.
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    sizes = (700, 1500, 700)
    all_of_them = [CandidateMix(2, 4)] * 3
    some = [some_of(2, 4, 4, groups)[0] for groups in sizes]
    for mix, draw, groups in zip(all_of_them + some, DRAWS * 2, sizes * 2, strict=True):
        weight, logits, grad = case(mix, groups)
        plain = mix.masked(weight, logits, draw), *mix.backward(weight, logits, grad, -0.3, draw)
        with monkeypatch.context() as patch:
            patch.setattr(candidate_mix, "_generated", lambda *_: _candidate_compiled.compiled())
            made = mix.masked(weight, logits, draw), *mix.backward(weight, logits, grad, -0.3, draw)
        for ours, theirs in zip(made, plain, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_kernels_are_generated_only_for_gpus_that_triton_knows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert not _candidate_compiled.serves(torch.device("cuda"))
    assert not _candidate_compiled.serves(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert _candidate_compiled.serves(torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not _candidate_compiled.serves(torch.device("cuda"))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("draw", DRAWS)
def test_gradient_of_the_candidates_is_autograds(pattern, draw, torch_only):
    mix = CandidateMix(*pattern)
    weight, logits, grad = case(mix, 50)
    leaf = logits.clone().requires_grad_()
    masked = weight * (probabilities(leaf, draw) @ mix.patterns.float())
    ((masked * grad).sum() - 0.3 * masked.square().sum()).backward()
    ours, again = mix.backward(weight, logits, grad, -0.3, draw)
    assert torch.allclose(ours, leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))
    assert torch.allclose(again, masked.detach(), atol=1e-5)


def test_gradient_of_the_relaxed_top_is_a_finite_difference():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    u, w = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    tau, keep, step = 0.7, 2, 1e-5

    def value(x):
        return float((relaxed_top(x / tau, keep) * w * u).sum())

    numeric = torch.zeros_like(logits)
    for at in range(logits.numel()):
        nudge = torch.zeros(logits.numel(), dtype=torch.float64)
        nudge[at] = step
        nudge = nudge.view_as(logits)
        numeric.view(-1)[at] = (value(logits + nudge) - value(logits - nudge)) / (2 * step)
    ours, _ = SoftTop(keep, 6).backward(
        w.float(), logits.float(), u.float(), 0.0, Draw(None, 1.0, tau)
    )
    assert torch.allclose(ours.double(), numeric, atol=1e-5)


def test_noise_is_gumbel_and_a_function_of_its_key():
    key = key_of(4, 7)
    noise = gumbel(0, (400_000,), key)
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 0.02
    assert torch.equal(noise[1000:2000], gumbel(1000, (1000,), key))
    other = gumbel(0, (400_000,), key_of(4, 8))
    both = torch.stack([noise, other])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1])) < 0.01


def test_draws_have_the_softmax_frequencies():
    # As tau goes to 0 the mixture is one pattern, drawn with probability softmax(kappa pi).
    mix = CandidateMix(2, 4)
    row = torch.tensor([0.02, -0.01, 0.0, 0.03, -0.02, 0.01])
    logits = row.repeat(60_000, 1)
    y = probabilities(logits, Draw(key_of(11), 50.0, 1e-3))
    seen = torch.bincount(y.argmax(-1), minlength=6) / len(y)
    assert torch.allclose(seen, torch.softmax(50 * row, -1), atol=0.008)
    assert float(y.amax(-1).mean()) > 0.99
    assert len(mix.patterns) == 6


@pytest.mark.parametrize("kind", [CandidateMix, SoftTop])
def test_choice_ignores_what_a_group_has_in_common(kind):
    mix = kind(2, 4)
    _, logits, shift = case(mix)
    assert torch.equal(mix.choose(logits), mix.choose(logits + shift[:, :1].round()))
    assert bool((mix.choose(logits).sum(-1) == 2).all())


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (2, 8), (4, 8)])
def test_prior_is_centred_and_prefers_its_mask(pattern):
    mix = CandidateMix(*pattern)
    mask = ~mix.patterns
    agreement = mix.prior(mask)
    assert torch.equal(agreement.argmax(-1), torch.arange(len(mask)))
    assert abs(float(agreement.mean())) < 1e-5
