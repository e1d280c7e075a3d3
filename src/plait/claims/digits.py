"""The ground of many claims: scikit-learn's handwritten digits and small networks on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.method import Method
from plait.step.adam import AdamW
from plait.train import train


def digits(seed: int, mislabelled: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the 1797 digits [n, 64] in [0, 1] in a seeded order, with a part of the first 1000 labels drawn anew."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    labels = torch.tensor(targets)[order]
    drawn = torch.randint(0, 10, labels.shape, generator=generator)
    wrong = (torch.rand(len(labels), generator=generator) < mislabelled) & (torch.arange(len(labels)) < 1000)
    return torch.tensor(inputs / 16.0, dtype=torch.float32)[order], torch.where(wrong, drawn, labels)


def network(seed: int, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """Return a network with one hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10))


def fitted(
    seed: int,
    methods: Sequence[Method],
    *,
    count: int = 200,
    steps: int = 200,
    batch_size: int = 32,
    mislabelled: float = 0.0,
    model: nn.Module | None = None,
) -> nn.Module:
    """Return a network that was trained on the first `count` digits, in evaluation mode."""
    inputs, targets = digits(seed, mislabelled)
    data = (inputs[:count], targets[:count])
    made = network(seed) if model is None else model
    return train(made, data, methods=methods, steps=steps, batch_size=batch_size, seed=seed).model.eval()


def best_test_loss(
    seed: int,
    make: Callable[[], nn.Module],
    methods: Sequence[Method],
    rates: Sequence[float],
    steps: int,
) -> float:
    """Return the loss on the last 797 digits after training on the first 1000, at the best of some rates of AdamW."""
    inputs, targets = digits(seed)
    found = []
    for rate in rates:
        model = fitted(seed, [*methods, AdamW(lr=rate)], count=1000, steps=steps, model=make())
        with torch.no_grad():
            found.append(float(F.cross_entropy(model(inputs[1000:]), targets[1000:])))
    return min(found)


@torch.no_grad()
def error(model: nn.Module, seed: int, noise: float = 0.0) -> float:
    """Return the part of the last 797 digits that is misread, with Gaussian noise on the inputs."""
    inputs, targets = digits(seed)
    moved = inputs[1000:] + noise * torch.randn(797, 64, generator=torch.Generator().manual_seed(seed))
    return float((model(moved).argmax(-1) != targets[1000:]).float().mean())


def attacked_error(model: nn.Module, seed: int, radius: float) -> float:
    """Return the part of the last 797 digits that is misread after a step of `radius` along the gradient's sign."""
    inputs, targets = digits(seed)
    held = inputs[1000:].clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(held), targets[1000:]), held)
    with torch.no_grad():
        moved = held + radius * slope.sign()
        return float((model(moved).argmax(-1) != targets[1000:]).float().mean())


@torch.no_grad()
def training_loss(model: nn.Module, seed: int, count: int) -> float:
    """Return the mean cross entropy on the digits that the network was trained on."""
    inputs, targets = digits(seed)
    return float(F.cross_entropy(model(inputs[:count]), targets[:count]))
