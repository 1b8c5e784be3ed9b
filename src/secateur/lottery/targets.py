"""Targets by one word: ``digits``, ``he:784-300-100-10``, or a safetensors file.

``digits`` is an MLP 64-32-10 trained for a second on scikit-learn's handwritten digits;
``he:...`` is a ReLU MLP with He-normal weights and no biases (only its sizes matter to a ticket).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from secateur.errors import MissingExtra, UsageError
from secateur.lottery.network import TargetNetwork
from secateur.lottery.reading import from_file, from_module


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's digits: 8 x 8 pixels in [0, 1]; float32 (n, 64) and labels (n,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def accuracy(self, logits: Tensor) -> float:
        """Share of the test set that is classified rightly."""
        return float((logits.argmax(1) == self.y_test).double().mean())


def load_digits() -> Digits:
    """1,347 training and 450 test images, shuffled with a fixed seed."""
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingExtra("scikit-learn", "forests", "the digits data") from None
    x, y = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, labels = torch.from_numpy(x / 16).float()[order], torch.from_numpy(y).long()[order]
    return Digits(images[:1347], labels[:1347], images[1347:], labels[1347:])


def train_mlp(
    x: Tensor, y: Tensor, sizes: tuple[int, ...], epochs: int = 30, seed: int = 0
) -> nn.Sequential:
    """A ReLU MLP trained with Adam, mini-batches of 64; reproducible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp(sizes)
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimiser.step()
    return model.eval()


def mlp(sizes: tuple[int, ...], bias: bool = True) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between."""
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        parts += [nn.Linear(inputs, outputs, bias), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def he_mlp(sizes: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    """A ReLU MLP with He-normal weights, without biases."""
    model = mlp(sizes, bias=False)
    generator = torch.Generator().manual_seed(seed)
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
    return model


def resolve_target(word: str) -> TargetNetwork:
    """See the module's docstring."""
    if word == "digits":
        digits = load_digits()
        return from_module(train_mlp(digits.x_train, digits.y_train, (64, 32, 10)))
    if word.startswith("he:"):
        try:
            sizes = tuple(int(part) for part in word[3:].split("-"))
        except ValueError:
            sizes = ()
        if len(sizes) < 2 or min(sizes) < 1:
            raise UsageError(
                "sizes are positive integers joined by '-'",
                field="network",
                value=word,
                fix="he:784-300-100-10",
            )
        return from_module(he_mlp(sizes))
    return from_file(word)
