"""Small targets shared by the lottery tests."""

import pytest
import torch
from torch import nn

from secateur.lottery import from_module
from secateur.lottery.targets import load_digits, train_mlp


@pytest.fixture(scope="session")
def digits():
    pytest.importorskip("sklearn", reason="the digits data come with scikit-learn")
    return load_digits()


@pytest.fixture(scope="session")
def digits_net(digits):
    """A 64-32-10 MLP trained for a second; its test accuracy is above 0.9."""
    return from_module(train_mlp(digits.x_train, digits.y_train, (64, 32, 10)))


@pytest.fixture(scope="session")
def small_net():
    torch.manual_seed(3)
    return from_module(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
