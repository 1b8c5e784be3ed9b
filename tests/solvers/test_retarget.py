"""The map to the dense stream against plain least squares."""

import torch

from secateur.evidence.statistics import InputMoments
from secateur.solvers.retarget import dense_map


def streams(tokens=400, width=12, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, width, generator=generator)
    mixing = torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator)
    return dense, dense @ mixing + noise * torch.randn(tokens, width, generator=generator)


def moments_of(dense, pruned):
    moments = InputMoments(dense.shape[1], gram=True)
    moments.update(pruned)
    moments.update_cross(dense, pruned)
    return moments


def test_without_damping_it_is_least_squares():
    dense, pruned = streams()
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.lstsq(pruned.double(), (dense @ weight.T).double()).solution.T
    got = weight @ dense_map(moments_of(dense, pruned), damping=1e-8)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


def test_equal_streams_leave_the_weight_alone():
    dense, _ = streams()
    moved = dense_map(moments_of(dense, dense))
    torch.testing.assert_close(moved, torch.eye(12), rtol=1e-4, atol=1e-4)


def test_it_comes_closer_to_the_dense_output():
    dense, pruned = streams()
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    target = dense @ weight.T
    moved = weight @ dense_map(moments_of(dense, pruned))
    assert (pruned @ moved.T - target).norm() < 0.9 * (pruned @ weight.T - target).norm()


def test_heavy_damping_returns_to_the_weight():
    dense, pruned = streams()
    moved = dense_map(moments_of(dense, pruned), damping=1e6)
    torch.testing.assert_close(moved, torch.eye(12), rtol=1e-3, atol=1e-3)
