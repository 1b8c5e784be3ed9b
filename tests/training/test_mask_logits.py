"""The logits of learned masks: what starts them and what they take."""

import pytest
import torch
from maskllm_cases import IDS, TARGET, attached, magnitude_masks, settings
from torch import nn

from secateur.data.windows import Windows
from secateur.kernels.candidate_mix import CandidateMix
from secateur.masks.selection import select
from secateur.masks.target import Cut, Scope, Target
from secateur.models.anatomy import Matrix, ModelView
from secateur.models.tiny import tiny_model
from secateur.training.loop import Hook, fit
from secateur.training.mask_logits import Learning, bytes_per_weight, first_logits


def test_the_prior_is_the_likeliest_mask_of_945_groups_in_a_thousand():
    matrix = Matrix("w", nn.Linear(1024, 1024, bias=False))
    mix = CandidateMix(2, 4)
    mask = select(matrix.tensor().abs(), Cut.of(matrix.shape, TARGET, Scope("row")))
    generator = torch.Generator().manual_seed(0)
    shares = {}
    for alpha in (3.0, 5.0, 0.0):
        logits = first_logits(matrix, mix, Learning(alpha=alpha), mask, generator)
        chosen = mix.choose(logits).view_as(mask)
        shares[alpha] = 1 - float((chosen != mask).view(-1, 4).any(-1).float().mean())
    assert abs(shares[3.0] - 0.945) < 0.003
    assert shares[5.0] > 0.998
    assert abs(shares[0.0] - 1 / 6) < 0.005


def test_moments_in_8_bits_take_two_bytes_a_logit_and_learn_about_the_same():
    pytest.importorskip("bitsandbytes")
    held = {}

    class Weigh(Hook):
        def end(self, at):
            state = [v for s in at.optimizer.state.values() for v in s.values()]
            large = [v for v in state if isinstance(v, torch.Tensor) and v.numel() >= 4096]
            held[at.settings.optimizer] = sum(v.nbytes for v in large)

    def losses(optimizer):
        model = tiny_model("llama")
        masks = attached(model)
        fitted = fit(
            model, Windows(IDS), settings(optimizer=optimizer), loss=masks.loss(),
            hooks=[masks, Weigh()],
        )  # fmt: skip
        return fitted.losses

    assert losses("adamw8bit") == pytest.approx(losses("adamw"), rel=2e-3)
    assert held["adamw8bit"] == held["adamw"] / 4


def test_memory_is_what_the_paper_counts():
    # Beside the byte of the mask that is started from.
    assert bytes_per_weight(2, 4, Learning()) == 24 + 1
    assert bytes_per_weight(1, 4, Learning()) == 16 + 1
    assert bytes_per_weight(2, 4, Learning(), "sgd") == 18 + 1
    assert bytes_per_weight(2, 4, Learning(), "adamw8bit") == 12 + 1.5 * 2 * (1 + 4 / 256) + 1
    assert bytes_per_weight(8, 16, Learning()) == 16 + 1
    assert bytes_per_weight(2, 4, Learning(), keep_best=True) == 30 + 1
    assert bytes_per_weight(2, 4, Learning(), keep_best=True, turns=5) == 6 + 1
    assert bytes_per_weight(2, 4, Learning(candidates=4), keep_best=True) == 20 + 1 + 1
    assert bytes_per_weight(4, 8, Learning(candidates=8)) == 16 + 1 + 1


@pytest.mark.parametrize(
    ("pattern", "count", "optimizer"),
    [((2, 4), 4, "adamw"), ((4, 8), 8, "adamw"), ((2, 4), 3, "adamw8bit"), ((2, 4), None, "sgd")],
)
def test_stated_memory_is_what_is_allocated(pattern, count, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    view = ModelView.of(model)
    prior = magnitude_masks(view, Target.parse("{}:{}".format(*pattern)))
    options = Learning(candidates=count)
    masks = attached(model, options, prior, pattern)
    modules = list(masks.modules.values())
    held = {"logits and gradients": sum(2 * m.mask_logits.nbytes for m in modules)}
    held["numbers"] = sum(m.mix.index.nbytes for m in modules if m.mix.index is not None)
    held["start"] = sum(mask.nbytes for mask in masks.start.values())
    small = sum(m.mask_logits.numel() for m in modules if m.mask_logits.numel() < 4096)

    class Weigh(Hook):
        def end(self, at):
            state = [v for s in at.optimizer.state.values() for v in s.values()]
            moments = [v for v in state if isinstance(v, torch.Tensor) and v.numel() > 1]
            held["moments"] = sum(v.nbytes for v in moments if v.numel() != 256)

    fit(
        model, Windows(IDS), settings(steps=2, optimizer=optimizer), loss=masks.loss(),
        hooks=[masks, Weigh()],
    )  # fmt: skip
    weights = sum(mask.numel() for mask in masks.start.values())
    if optimizer == "adamw8bit":  # which leaves small tensors in 32 bits
        held["moments"] -= small * (8 - 2 * (1 + 4 / 256))
    assert sum(held.values()) / weights == pytest.approx(
        bytes_per_weight(*pattern, options, optimizer), rel=1e-3
    )
