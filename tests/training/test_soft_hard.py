"""Two-way distillation and the fusion of gradients: what reaches whom, and in what proportion."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import UsageError
from secateur.training.mask_fusion import fuse, norm, pressure
from secateur.training.soft_hard import COUPLED, gap, gaps, jensen_shannon, standardised

# Draws are small, but the machine may be busy.
relaxed = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
VARIANTS = ("t1", "t2", "t3", "t4", "t5", "t6", "one-way", "none")


def two_networks(seed=0):
    """Soft logits of weights and a mask, hard logits of the same weights and of no mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    u = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    soft = (x * torch.sigmoid(u)) @ theta
    hard = x[:, :3] @ theta[:3]
    return soft, hard, theta, u


def kl(p, q):
    return (torch.softmax(p, -1) * (torch.log_softmax(p, -1) - torch.log_softmax(q, -1))).sum(1)


BY_HAND = {
    # (a) to the weights, (b) to the masks; each on its own graph, with its constants cut out.
    "t1": (lambda s, h: kl(s.detach(), h), lambda s, h: kl(s, h.detach())),
    "t3": (lambda s, h: kl(s.detach(), h), lambda s, h: kl(h.detach(), s)),
    "t5": (lambda s, h: kl(h, s.detach()), lambda s, h: kl(h.detach(), s)),
    "t6": (lambda s, h: kl(h, s.detach()), lambda s, h: kl(s, h.detach())),
}


@pytest.mark.parametrize("variant", sorted(BY_HAND))
def test_decoupled_variants_are_four_separate_gradients(variant):
    to_weights, to_masks = BY_HAND[variant]
    soft, hard, theta, u = two_networks()
    found = gaps(soft, hard, variant)
    ours_theta = torch.autograd.grad(found.joint, theta, retain_graph=True)[0]
    assert torch.autograd.grad(found.joint, u, retain_graph=True, allow_unused=True)[0] is None
    ours_u = torch.autograd.grad(found.masks, u)[0]
    soft, hard, theta, u = two_networks()
    by_hand = torch.autograd.grad(to_weights(soft, hard).mean(), theta, retain_graph=True)[0]
    assert torch.allclose(ours_theta, by_hand, atol=1e-7)
    assert torch.allclose(ours_u, torch.autograd.grad(to_masks(soft, hard).mean(), u)[0], atol=1e-7)
    assert not by_hand[3:].any()  # what the hard network does not have learns nothing from it


@pytest.mark.parametrize("variant", COUPLED)
def test_coupled_variants_reach_everything(variant):
    soft, hard, theta, u = two_networks()
    found = gaps(soft, hard, variant)
    assert found.masks is None
    grads = torch.autograd.grad(found.joint, [theta, u])
    assert all(bool(g.any()) for g in grads)
    assert bool(grads[0][3:].any())  # through the soft network


def test_ablations_leave_out_what_they_say():
    soft, hard, _, _ = two_networks()
    one_way = gaps(soft, hard, "one-way")
    assert one_way.masks is None
    assert torch.equal(one_way.joint, gaps(soft, hard, "t1").joint)
    nothing = gaps(soft, hard, "none")
    assert nothing.joint is None
    assert nothing.masks is None
    with pytest.raises(UsageError, match="unknown variant"):
        gaps(soft, hard, "t7")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("auto", [False, True])
def test_equal_networks_have_no_gap(variant, auto):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    found = gaps(logits.requires_grad_(), logits.clone(), variant, auto)
    for loss in (found.joint, found.masks):
        assert loss is None or abs(loss.item()) < 1e-6
    assert float(jensen_shannon(logits, logits).max()) < 1e-9


def test_the_gap_is_torchs_divergence():
    s, h = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    wanted = F.kl_div(
        torch.log_softmax(h, -1), torch.log_softmax(s, -1), log_target=True, reduction="batchmean"
    )
    assert torch.allclose(gap(s, h), wanted)


def test_auto_temperature_forgets_scale_and_shift():
    s, h = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(standardised(s).std(-1, unbiased=False), torch.ones(9), atol=1e-4)
    assert torch.allclose(gap(s, h, True), gap(7 * s + 3, 0.2 * h - 1, True), atol=1e-4)


@relaxed
@given(st.integers(0, 500))
def test_jensen_shannon_is_symmetric_and_at_most_a_bit(seed):
    s, h = 20 * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed))
    js = jensen_shannon(s, h)
    assert torch.allclose(js, jensen_shannon(h, s), atol=1e-6)
    assert bool((js >= 0).all())
    assert bool((js <= math.log(2) + 1e-6).all())


# -- fusion --------------------------------------------------------------------------------------


def three(seed, groups=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            f"g{i}": torch.randn(4 + i, generator=generator) * 10 ** (2 * part - 3)
            for i in range(groups)
        }
        for part in range(3)
    ]


@relaxed
@given(
    st.integers(0, 500), st.floats(0, 1), st.floats(0.05, 3), st.floats(0.1, 10), st.floats(1e-3, 1e3)
)  # fmt: skip
def test_the_parts_stand_in_the_ratio_asked_for(seed, dy, dis_scale, kd_scale, blow):
    task, kd, flops = three(seed)
    how = {"kd_scale": kd_scale, "dis_scale": dis_scale}
    whole = fuse(task, kd, flops, dy, **how)
    images = fuse(task, kd, flops, 0.0, **how)
    only_flops = {k: whole[k] - images[k] for k in whole}
    assert math.isclose(norm(images), dis_scale * 3**0.5, rel_tol=1e-4)
    assert math.isclose(norm(only_flops), dy * 3**0.5, rel_tol=1e-3, abs_tol=1e-5)
    # The gap's part is as long as kd_scale says, whatever its loss is measured in.
    size = norm(task)
    direction = {k: g + kd[k] * (kd_scale * size / norm(kd)) for k, g in task.items()}
    for key, value in images.items():
        assert torch.allclose(value / norm(images), direction[key] / norm(direction), atol=1e-4)
    louder = fuse(
        task,
        {k: blow * g for k, g in kd.items()},
        {k: blow * g for k, g in flops.items()},
        dy,
        **how,
    )
    assert all(torch.allclose(louder[k], whole[k], rtol=1e-3, atol=1e-5) for k in whole)


def test_missing_parts_are_left_out():
    task, kd, flops = three(0)
    nothing = {k: torch.zeros_like(g) for k, g in task.items()}
    only = fuse(nothing, {}, flops, 1.0)
    assert math.isclose(norm(only), 3**0.5, rel_tol=1e-5)
    assert norm(fuse(nothing, {}, nothing, 1.0)) == 0
    assert math.isclose(norm(fuse(nothing, kd, nothing, 1.0, dis_scale=1.0)), 3**0.5, rel_tol=1e-5)


def test_flops_press_until_inside_the_tolerance_then_fade():
    assert pressure(0.9, 0.5, 0.02) == 1.0
    assert pressure(0.48, 0.5, 0.02) == 1.0
    assert math.isclose(pressure(0.51, 0.5, 0.02), 0.25, rel_tol=1e-6)
    assert pressure(0.5, 0.5, 0.02) == 0.0
