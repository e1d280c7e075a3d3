"""Claims of AdamP, diffGrad and AdAdaGrad: handwritten digits with some wrong labels, as in `plait.claims.step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.step import Make, best, digits, error, misfit, settings
from plait.data.batch_size import AdaptiveBatchSize
from plait.method import Method, Now
from plait.step.adagrad import AdaGrad
from plait.step.adam import Adam, AdamW
from plait.step.friction import DiffGrad
from plait.step.scale_invariant import AdamP
from plait.train import train


@claim(
    "diffgrad",
    says="diffGrad reaches a lower test misfit than Adam",
    baseline="Adam, the same learning rates tried",
    figure="test cross entropy, best of 5 rates on validation",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def friction_beats_none(seed: int) -> tuple[float, float]:
    """Nothing but the friction differs; the rates reach beyond both rules' best, since friction halves small steps."""
    rates = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    return best(settings(DiffGrad, rates), seed, misfit), best(settings(Adam, rates), seed, misfit)


def normalized_network(make: Make, seed: int, steps: int = 250, batch: int = 32) -> tuple[nn.Module, list[Tensor]]:
    """Return a network 64-48-48-10 with batch normalization after so many steps, and its normalized weights before."""
    torch.manual_seed(seed)
    hidden = (nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU())
    model = nn.Sequential(*hidden, nn.Linear(48, 10))
    before = [model.get_parameter(f"{place}.weight").detach().clone() for place in (0, 3)]
    (x, y), _, _ = digits(seed)
    rule = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1 - step / steps)
    draw = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,), generator=draw)
        rule.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        rule.step()
        scheduler.step()
    return model.eval(), before


@claim(
    "adamp",
    says="weights before a batch normalization grow less under AdamP than under Adam",
    baseline="AdamW without decay, at the same learning rate",
    figure="mean length of the normalized weights after training over that before",
    better="lower",
)
def lengths_stay(seed: int) -> tuple[float, float]:
    """What the method takes out is what lengthens."""

    def growth(rule: type[AdamP] | type[AdamW]) -> float:
        model, before = normalized_network(settings(rule, [1e-2])[0], seed)
        after = [model.get_parameter(f"{place}.weight") for place in (0, 3)]
        ratios = [float(a.detach().norm() / b.norm()) for a, b in zip(after, before, strict=True)]
        return sum(ratios) / len(ratios)

    return growth(AdamP), growth(AdamW)


@claim(
    "adamp",
    says="with batch normalization AdamP reaches a lower test misfit than AdamW",
    baseline="AdamW, the same learning rates and decays tried",
    figure="test cross entropy, best of 3 rates and 2 decays on validation",
    better="lower",
)
def the_radial_part_is_better_left_out(seed: int) -> tuple[float, float]:
    """Nothing but the projection differs."""

    def figure(makes: Sequence[Make]) -> float:
        _, validation, test = digits(seed)
        models = [normalized_network(make, seed)[0] for make in makes]
        return misfit(min(models, key=lambda m: misfit(m, validation)), test)

    rates, decays = [1e-3, 3e-3, 1e-2], [0.0, 0.1]
    return figure(settings(AdamP, rates, decays)), figure(settings(AdamW, rates, decays))


EXAMPLES, SMALLEST, LARGEST, RATES = 8_000, 8, 128, (1e-2, 3e-2, 1e-1)


@cache
def on_as_many_examples(lr: float, batch_size: int, grows: bool, seed: int) -> tuple[nn.Module, int]:
    """Train a network 64-48-48-10 by AdaGrad on `EXAMPLES` examples; return it, and in how many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    methods: list[Method] = [AdaptiveBatchSize(most=LARGEST)] if grows else []
    seen = 0

    def enough(now: Now) -> bool:
        nonlocal seen
        seen += len(now.batch)
        return seen >= EXAMPLES

    done = train(
        model,
        digits(seed)[0],
        methods=[*methods, AdaGrad(lr=lr)],
        steps=EXAMPLES // SMALLEST,
        batch_size=batch_size,
        seed=seed,
        on_step=enough,
    )
    return done.model.eval(), done.now.step


def grown(seed: int) -> list[tuple[nn.Module, int]]:
    """Return the networks, one for each rate, whose batches began with 8 examples and could grow to 128."""
    return [on_as_many_examples(lr, SMALLEST, True, seed) for lr in RATES]


def chosen(
    models: Sequence[tuple[nn.Module, int]], seed: int, figure: Callable[[nn.Module, tuple[Tensor, Tensor]], float]
) -> float:
    """Return the test figure of the network whose validation figure is lowest."""
    _, validation, test = digits(seed)
    return figure(min((m for m, _ in models), key=lambda m: figure(m, validation)), test)


@claim(
    "adadagrad",
    says="on the same examples, batches that grow leave a lower test misfit than the largest batch throughout",
    baseline="AdaGrad with batches of 128, the same learning rates tried",
    figure="test cross entropy after 8000 examples, best of 3 rates on validation",
    better="lower",
)
def growing_batches_beat_large_ones(seed: int) -> tuple[float, float]:
    """Large batches take few steps: what is tested is whether small ones at the start are worth theirs."""
    large = [on_as_many_examples(lr, LARGEST, False, seed) for lr in RATES]
    return chosen(grown(seed), seed, misfit), chosen(large, seed, misfit)


@claim(
    "adadagrad",
    says="batches that grow reach at least the test error of the smallest batch plus one percentage point",
    baseline="AdaGrad with batches of 8, which takes many times the steps, the same learning rates tried",
    figure="test error in percent after 8000 examples, best of 3 rates on validation",
    better="lower",
    margin=-1.0,
)
def growing_batches_keep_up_with_small_ones(seed: int) -> tuple[float, float]:
    """The baseline takes 1000 steps."""
    small = [on_as_many_examples(lr, SMALLEST, False, seed) for lr in RATES]
    return chosen(grown(seed), seed, error), chosen(small, seed, error)


@claim(
    "adadagrad",
    says="on the same examples in as many steps, batches that grow leave a lower test misfit than a constant batch",
    baseline="AdaGrad with the constant batch that takes as many steps, at the same learning rates",
    figure="test cross entropy after 8000 examples, best of 3 rates on validation",
    better="lower",
)
def growing_batches_beat_their_mean(seed: int) -> tuple[float, float]:
    """The constant batch is chosen for each rate alone. It wins with Adam in AdaGrad's place too."""
    ours = grown(seed)
    constant = [
        on_as_many_examples(lr, round(EXAMPLES / steps), False, seed)
        for lr, (_, steps) in zip(RATES, ours, strict=True)
    ]
    return chosen(ours, seed, misfit), chosen(constant, seed, misfit)
