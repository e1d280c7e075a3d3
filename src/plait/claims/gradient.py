"""What gradient methods must reach."""

from __future__ import annotations

import torch
from torch import nn

from plait.claims.base import claim
from plait.claims.digits import error, fitted, training_loss
from plait.gradient.noise import GradientNoise
from plait.gradient.sharpness import AMP, GAM
from plait.method import Method
from plait.step.adam import AdamW
from plait.step.momentum import SGD


def _deep(seed: int) -> nn.Module:
    """Return fourteen ReLU layers that start far too small to learn."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(64, 32)]
    for _ in range(12):
        layers += [nn.ReLU(), nn.Linear(32, 32)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 10))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.0)
    return model


@claim(
    "gradient-noise",
    says="Annealed noise gets a very deep network with a poor start to learn, where plain SGD stays at chance.",
    baseline="SGD without noise, at the better of the rates 0.01 and 0.1",
    figure="training loss",
    better="lower",
    margin=0.3,
    seeds=4,
)
def noise_trains_a_poorly_started_deep_network(seed: int) -> tuple[float, float]:
    """14 ReLU layers with weights of deviation 0.1, 500 digits, 400 steps."""

    def loss(methods: list[Method]) -> float:
        return training_loss(fitted(seed, methods, count=500, steps=400, model=_deep(seed)), seed, 500)

    return loss([SGD(lr=0.01), GradientNoise(variance=0.3)]), min(loss([SGD(lr=lr)]) for lr in (0.01, 0.1))


def error_after_wrong_labels(seed: int, methods: list[Method]) -> float:
    """Return the test error after training on 500 digits of which 30 % have a random label."""
    rule = AdamW(lr=3e-3, weight_decay=0.0)
    return error(fitted(seed, [rule, *methods], count=500, steps=400, mislabelled=0.3), seed)


@claim(
    "amp",
    says="Training at adversarially perturbed weights misreads fewer digits after training on wrong labels.",
    baseline="AdamW alone, the same batches",
    figure="test error after training with 30 % random labels",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def amp_resists_wrong_labels(seed: int) -> tuple[float, float]:
    """500 training digits, one hidden layer."""
    return error_after_wrong_labels(seed, [AMP(radius=0.5)]), error_after_wrong_labels(seed, [])


@claim(
    "gam",
    says="Minimizing first-order flatness misreads fewer digits after training on wrong labels.",
    baseline="AdamW alone, the same batches",
    figure="test error after training with 30 % random labels",
    better="lower",
    seeds=4,
)
def gam_resists_wrong_labels(seed: int) -> tuple[float, float]:
    """500 training digits, one hidden layer."""
    return error_after_wrong_labels(seed, [GAM(strength=1.0, radius=0.2)]), error_after_wrong_labels(seed, [])
