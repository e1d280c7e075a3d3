"""What penalties must reach."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.digits import attacked_error, digits, error, fitted
from plait.method import Method
from plait.penalty.adversarial import SMART
from plait.penalty.norm import L2, NormLoss
from plait.penalty.orthogonal import GOR
from plait.penalty.spectral import SpectralRegularization
from plait.step.adam import AdamW
from plait.train import train

RULE = AdamW(lr=3e-3, weight_decay=0.0)


@claim(
    "gor",
    says="Filters that are orthonormal in groups misread fewer digits under input noise than smaller filters do.",
    baseline="L2 of the same strength, better here than weaker L2",
    figure="test error with noise of deviation 0.3",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def groups_beat_l2_under_noise(seed: int) -> tuple[float, float]:
    """200 training digits, one hidden layer."""
    ours, theirs = (fitted(seed, [RULE, penalty]) for penalty in (GOR(strength=0.01), L2(strength=0.01)))
    return error(ours, seed, noise=0.3), error(theirs, seed, noise=0.3)


@claim(
    "gor",
    says="Filters that are orthonormal in groups misread fewer digits under input noise than free ones.",
    baseline="the same training without a penalty",
    figure="test error with noise of deviation 0.3",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def groups_help_under_noise(seed: int) -> tuple[float, float]:
    """200 training digits, one hidden layer."""
    ours, theirs = fitted(seed, [RULE, GOR(strength=0.01)]), fitted(seed, [RULE])
    return error(ours, seed, noise=0.3), error(theirs, seed, noise=0.3)


@claim(
    "norm-loss",
    says="The norm loss forgives a bad choice of its strength: the worst error over three strengths is lower.",
    baseline="L2 over the same strengths",
    figure="worst test error over strengths 0.001, 0.01, 0.1",
    better="lower",
    seeds=4,
)
def norm_loss_is_insensitive_to_its_strength(seed: int) -> tuple[float, float]:
    """200 training digits, one hidden layer."""
    worst = []
    for kind in (NormLoss, L2):
        strengths = (1e-3, 1e-2, 1e-1)
        worst.append(max(error(fitted(seed, [RULE, kind(strength=s)], steps=120), seed) for s in strengths))
    return worst[0], worst[1]


def _plasticity(seed: int, penalty: Method) -> float:
    """Return the mean loss at the end of the last four of ten tasks: to memorize random labels, one after the other."""
    inputs = digits(seed)[0][:100]
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    losses = []
    for task in range(10):
        labels = torch.randint(0, 10, (100,), generator=torch.Generator().manual_seed(100 * seed + task))
        rule = AdamW(lr=1e-2, weight_decay=0.0)
        model = train(model, (inputs, labels), methods=[rule, penalty], steps=50, batch_size=50, seed=task).model
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(inputs), labels)))
    return sum(losses[-4:]) / 4


@claim(
    "spectral-reg",
    says="A network whose singular values stay near one goes on learning new random labels where L2 slows down.",
    baseline="L2 of the same strength, which does better here than no penalty and than stronger L2",
    figure="mean training loss at the end of the last 4 of 10 tasks",
    better="lower",
    seeds=4,
)
def spectral_regularization_keeps_plasticity(seed: int) -> tuple[float, float]:
    """Ten tasks of memorizing random labels of 100 digits, 50 steps each, at a high learning rate."""
    return _plasticity(seed, SpectralRegularization(strength=1e-3)), _plasticity(seed, L2(strength=1e-3))


SMOOTH = SMART(strength=3.0, radius=0.1, noise=0.01, step=0.1)


@claim(
    "smart",
    says="Smoothness makes a network misread fewer digits that are moved along the gradient's sign.",
    baseline="the same training without the penalty",
    figure="test error after a sign step of 0.1",
    better="lower",
)
def smart_resists_small_changes(seed: int) -> tuple[float, float]:
    """200 training digits; the penalty's ball has the radius of the attack."""
    ours, theirs = fitted(seed, [RULE, SMOOTH], steps=150), fitted(seed, [RULE], steps=150)
    return attacked_error(ours, seed, 0.1), attacked_error(theirs, seed, 0.1)


@claim(
    "smart",
    says="Smoothness does not cost accuracy on clean digits: the test error rises by less than 2 points.",
    baseline="the same training without the penalty",
    figure="test error",
    better="lower",
    margin=-0.02,
)
def smart_keeps_clean_accuracy(seed: int) -> tuple[float, float]:
    """200 training digits."""
    ours, theirs = fitted(seed, [RULE, SMOOTH], steps=150), fitted(seed, [RULE], steps=150)
    return error(ours, seed), error(theirs, seed)
