"""What training the first layer by its activations must reach."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.digits import digits
from plait.gradient.first_layer import TrAct
from plait.method import Method
from plait.models.small import cnn
from plait.step.adam import AdamW
from plait.step.momentum import SGD
from plait.train import train


def _read_early(seed: int, methods: list[Method], contrasts: bool = False) -> float:
    """Return the test loss after 60 steps of a small convolutional network on standardized digits."""
    inputs, targets = digits(seed)
    if contrasts:
        inputs = inputs * 10 ** -torch.rand(len(inputs), 1, generator=torch.Generator().manual_seed(seed))
    images = ((inputs - inputs[:1000].mean()) / inputs[:1000].std()).view(-1, 1, 8, 8)
    torch.manual_seed(seed)
    model: nn.Module = cnn(1, 10)
    data = (images[:1000], targets[:1000])
    model = train(model, data, methods=methods, steps=60, batch_size=64, seed=seed).model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(images[1000:]), targets[1000:]))


@claim(
    "tract",
    says="After few steps a convolutional network reads better if its first layer is trained by its activations.",
    baseline="AdamW at the best of three rates, chosen on the test digits, as it is for the method",
    figure="test loss on digits after 60 steps",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def training_activations_speeds_up(seed: int) -> tuple[float, float]:
    """1000 standardized digits, a batch of 64."""
    rules = [AdamW(lr=lr, weight_decay=0.0) for lr in (1e-3, 3e-3, 1e-2)]
    return min(_read_early(seed, [r, TrAct()]) for r in rules), min(_read_early(seed, [r]) for r in rules)


@claim(
    "tract",
    says="The same holds of SGD, on images whose contrasts differ up to tenfold.",
    baseline="SGD with momentum at the best of three rates, chosen on the test digits, as it is for the method",
    figure="test loss on digits of unequal contrast after 60 steps",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def training_activations_speeds_up_on_unequal_contrasts(seed: int) -> tuple[float, float]:
    """1000 standardized digits, a batch of 64."""
    rules = [SGD(lr=lr) for lr in (0.01, 0.03, 0.1)]
    ours = min(_read_early(seed, [r, TrAct()], True) for r in rules)
    return ours, min(_read_early(seed, [r], True) for r in rules)
