"""Claims of weights that are low-rank and sparse from scratch, on upright digits of `plait.claims.parametrize`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from plait.claims.base import claim
from plait.claims.parametrize import Task, accuracy, fit, network, pick
from plait.method import Method
from plait.parametrize.low_rank_sparse import SLTrain

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@torch.no_grad()
def factored(seed: int, rank: int) -> nn.Module:
    """Return the network with its two wide layers as products of factors, the nearest to what they would start as."""
    model = network(seed)
    for place in (0, 2):
        layer: nn.Linear = model[place]  # type: ignore[index]
        u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
        first, second = nn.Linear(64, rank, bias=False), nn.Linear(rank, 64)
        first.weight.copy_(s[:rank, None].sqrt() * vh[:rank])
        second.weight.copy_(u[:, :rank] * s[:rank].sqrt())
        second.bias.copy_(layer.bias)
        model[place] = nn.Sequential(first, second)  # type: ignore[operator]
    return model


def from_scratch(seed: int, make: Callable[[int], nn.Module], *methods: Method) -> float:
    """Return the held-out accuracy of a network after 300 steps on 400 digits, at the best of four learning rates."""
    task = Task(lambda images: images, 400, 300, seed)

    def candidate(rate: float) -> nn.Module:
        return fit(make(seed), task.train, methods, task.steps, rate, seed)

    return accuracy(pick([partial(candidate, rate) for rate in RATES], task.choose), task.test)


@claim(
    "sltrain",
    says="trained from scratch, SLTrain (rank 4 and 256 entries a layer) classifies digits better than low rank alone",
    baseline="the same layers as products of factors of rank 6 (as many numbers), begun by the SVD of the usual start",
    figure="accuracy on held-out digits",
    better="higher",
    seeds=10,
)
def sparse_entries_help_low_rank(seed: int) -> tuple[float, float]:
    """Compare at 300 steps on 400 digits; each side has the best of four learning rates."""
    sparse = SLTrain(rank=4, alpha=4.0, density=0.0625, where="0|2")
    return from_scratch(seed, network, sparse), from_scratch(seed, partial(factored, rank=6))
