"""Claims of the optimizers: handwritten digits, a small network, each rule at the best of an equal number of settings.

The setting of every rule is chosen on a validation split by its own best figure; the figure that is compared is the
test split's. 400 examples train, 400 validate, the rest test; a tenth of the training labels is wrong, so that it
matters what a rule does to the weights and not only how fast it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.step.adam import AdaBelief, Adam, AdamW
from plait.step.layerwise import LAMB
from plait.step.low_rank import Fira, GaLore
from plait.step.momentum import Lion

Make = Callable[[nn.Module], torch.optim.Optimizer]
Split = tuple[Tensor, Tensor]


@cache
def digits(seed: int) -> tuple[Split, Split, Split]:
    """Return (train, validation, test), each (inputs [n, 64], labels [n]), with wrong labels in the first only."""
    from sklearn.datasets import load_digits

    held = load_digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(held.target), generator=draw)
    x, y = torch.tensor(held.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(held.target)[order]
    wrong = torch.rand(400, generator=draw) < 0.1
    noisy = torch.where(wrong, torch.randint(0, 10, (400,), generator=draw), y[:400])
    return (x[:400], noisy), (x[400:800], y[400:800]), (x[800:], y[800:])


def trained(make: Make, seed: int, steps: int, batch: int) -> nn.Module:
    """Return a network 64-48-48-10 after so many steps, the learning rate falling linearly to 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    (x, y), _, _ = digits(seed)
    rule = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / steps)
    draw = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,), generator=draw) if batch < len(x) else slice(None)
        rule.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        rule.step()
        scheduler.step()
    return model


@torch.no_grad()
def misfit(model: nn.Module, split: Split) -> float:
    """Return the cross entropy on a split."""
    return float(F.cross_entropy(model(split[0]), split[1]))


@torch.no_grad()
def error(model: nn.Module, split: Split) -> float:
    """Return the rate of wrong answers on a split, in percent."""
    return 100 * float((model(split[0]).argmax(1) != split[1]).float().mean())


def best(
    makes: Sequence[Make],
    seed: int,
    figure: Callable[[nn.Module, Split], float],
    *,
    steps: int = 250,
    batch: int = 32,
) -> float:
    """Return the test figure of the setting whose validation figure is lowest."""
    _, validation, test = digits(seed)
    models = [trained(make, seed, steps, batch) for make in makes]
    return figure(min(models, key=lambda m: figure(m, validation)), test)


def settings(rule: Any, rates: Sequence[float], decays: Sequence[float] = (0.0,), **fields: Any) -> list[Make]:
    """Return makers of one rule over a grid of learning rates and decays."""

    def maker(lr: float, decay: float) -> Make:
        return lambda m: rule(m.parameters(), lr=lr, weight_decay=decay, **fields)

    return [maker(lr, decay) for lr in rates for decay in decays]


@claim(
    "adamw",
    says="decoupled decay leaves a lower test misfit than decay as an L2 penalty in Adam",
    baseline="Adam with an L2 penalty, as many strengths tried",
    figure="test cross entropy, best of 4 strengths on validation",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def decoupled_decay_beats_l2(seed: int) -> tuple[float, float]:
    """Each grid reaches from too little to too much; decoupled strengths are larger, being multiplied by the rate."""
    ours = settings(AdamW, [1e-2], [0.03, 0.1, 0.3, 1.0])
    theirs = settings(Adam, [1e-2], [3e-4, 1e-3, 3e-3, 1e-2])
    return best(ours, seed, misfit), best(theirs, seed, misfit)


@claim(
    "lion",
    says="Lion, with one state, reaches at least AdamW's test error plus one percentage point",
    baseline="AdamW, as many learning rates tried",
    figure="test error in percent, best of 3 rates on validation",
    better="lower",
    margin=-1.0,
    seeds=10,
    first_seed=100,
)
def as_good_as_adamw_with_half_the_state(seed: int) -> tuple[float, float]:
    """Decays grow as the rates shrink, as the authors advise."""
    ours = settings(Lion, [1e-3, 3e-3, 1e-2], [0.3])
    theirs = settings(AdamW, [1e-3, 3e-3, 1e-2], [0.1])
    return best(ours, seed, error), best(theirs, seed, error)


@claim(
    "adabelief",
    says="AdaBelief reaches a lower test misfit than Adam",
    baseline="AdamW with the same decay, the same learning rates tried",
    figure="test cross entropy, best of 3 rates on validation",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def belief_beats_the_square(seed: int) -> tuple[float, float]:
    """Nothing but the second moment differs."""
    rates, decays = [1e-3, 3e-3, 1e-2], [0.1]
    return best(settings(AdaBelief, rates, decays), seed, misfit), best(settings(AdamW, rates, decays), seed, misfit)


@claim(
    "lamb",
    says="with full batches and few steps, LAMB reaches a lower test misfit than AdamW",
    baseline="AdamW, as many learning rates and the same decays tried",
    figure="test cross entropy after 40 full-batch steps, best of 4 rates and 2 decays on validation",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def large_batches_in_few_steps(seed: int) -> tuple[float, float]:
    """Rates of LAMB are relative changes of a layer; each grid reaches from too slow to unstable."""
    ours = settings(LAMB, [0.04, 0.08, 0.15, 0.3], [0.01, 1.0])
    theirs = settings(AdamW, [1e-2, 2e-2, 5e-2, 1e-1], [0.01, 1.0])
    few: dict[str, Any] = {"steps": 40, "batch": 400}
    return best(ours, seed, misfit, **few), best(theirs, seed, misfit, **few)


@claim(
    "fira",
    says="at the same rank and state, following the residual leaves a lower test misfit than GaLore",
    baseline="GaLore of the same rank, period and learning rates",
    figure="test cross entropy at rank 4, best of 3 rates on validation",
    better="lower",
)
def the_residual_is_worth_following(seed: int) -> tuple[float, float]:
    """Both at scale 1, in exact subspaces, as published."""
    rates = [3e-3, 1e-2, 3e-2]
    same: dict[str, Any] = {"rank": 4, "period": 50, "subspace": "exact", "spread": False}
    ours = settings(Fira, rates, **same)
    theirs = settings(GaLore, rates, scale=1.0, **same)
    return best(ours, seed, misfit), best(theirs, seed, misfit)
