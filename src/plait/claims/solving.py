"""Numbers that follow solutions of the training problem inside one run, against grids that cost as much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from plait.claims.base import claim
from plait.claims.tuning import (
    PENALTIES,
    SHORT,
    Build,
    Settings,
    grid,
    linear,
    loss,
    network,
    noisy_digits,
    penalized,
    regression,
)
from plait.constrain.norm import NormBall
from plait.loops.constrained import LVHBA
from plait.loops.hypergradient import HOAG
from plait.loops.inexact import MAID
from plait.loops.tuning import Tuner
from plait.method import Method
from plait.schedule import Tuned
from plait.step.adam import AdamW
from plait.step.momentum import SGD
from plait.train import Run, train

STEPS = 400
"""Training steps of a run that tunes, each of 50 examples."""
WHOLE = 4
"""Batches in the 200 examples of the training set, and in those of the validation set."""
LEAST = 1e-3
"""The least decay of softmax regression, and so the convexity of its objective."""


def run(
    seed: int,
    methods: Sequence[Method],
    steps: int,
    model: nn.Module,
    optimizer: Method = AdamW(lr=3e-3, weight_decay=0.0),
) -> Run:
    """Return the run of a model on the training digits, tuned on the validation digits."""
    data, held, _ = noisy_digits(seed)
    options: dict[str, Any] = {"steps": steps, "batch_size": 50, "seed": seed, "validation": held}
    return train(model, data, methods=[*methods, optimizer], **options)


def cost(done: Run, tuner: Tuner, times: int) -> int:
    """Return what a run cost, in gradients on a batch: steps, whole gradients and products, validation gradients."""
    return STEPS + WHOLE * (int(done.now.of(tuner)["evaluations"]) + times)


def best_of(seed: int, build: Build, points: Sequence[Settings], budget: int, convex: bool) -> float:
    """Return the test loss of the best point on the validation set, of as many as a budget pays for, and one more."""
    model = regression if convex else network
    count = math.ceil(budget / SHORT)
    tried = [run(seed, build(*point), SHORT, model(seed)).model for point in points[:count]]
    return loss(min(tried, key=lambda made: loss(made, seed, 1)), seed, 2)


def levels(ranges: Sequence[tuple[float, float]], count: int) -> list[list[float]]:
    """Return levels of each range, evenly on the scale of logarithms, half a gap from its ends."""
    return [[low * (high / low) ** ((i + 0.5) / count) for i in range(count)] for low, high in ranges]


def numbers(ranges: Sequence[tuple[float, float]], lows: Sequence[float], highs: Sequence[float]) -> list[Tuned]:
    """Return numbers that start in the middle of each range, on the scale of logarithms."""
    middles = [(low * high) ** 0.5 for low, high in ranges]
    ends = enumerate(zip(middles, lows, highs, strict=True))
    return [Tuned(start=start, low=low, high=high, name=str(i)) for i, (start, low, high) in ends]


# -- HOAG --------------------------------------------------------------------------------------------------------------
@cache
def _hoag(seed: int, convex: bool) -> tuple[Run, int]:
    """One run from the middles of the ranges, and its cost."""
    tuner = HOAG(warmup=100, every=50, schedule="quadratic", first_tolerance=0.1, iterations=20)
    ranges = PENALTIES[1:] if convex else PENALTIES
    highs = [math.inf] * (len(ranges) - 2) + [0.5, math.inf]
    methods = (linear if convex else penalized)(*numbers(ranges, [0.0] * len(ranges), highs))
    done = run(seed, [tuner, *methods], STEPS, (regression if convex else network)(seed))
    return done, cost(done, tuner, (STEPS - 100) // 50)


@claim(
    "hoag",
    says="Inside one run, tuning the decay of each of two layers, label smoothing and the z-loss's weight reaches a "
    "lower test loss than a grid search of the same cost.",
    baseline="runs of a grid with two levels of each of the four numbers, as many as cost as much; the best on the "
    "validation set",
    figure="test loss",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def layers_beat_a_grid_inside_a_run(seed: int) -> tuple[float, float]:
    """The cost counts gradients and Hessian products, by the examples that they are of."""
    done, budget = _hoag(seed, convex=False)
    return loss(done.model, seed, 2), best_of(seed, penalized, grid(seed, levels(PENALTIES, 2)), budget, convex=False)


@claim(
    "hoag",
    says="In softmax regression, which is convex as the theory asks, tuning decay, label smoothing and the z-loss's "
    "weight inside one run reaches a lower test loss than a grid search of the same cost.",
    baseline="runs of a grid with three levels of each of the three numbers, as many as cost as much; the best on the "
    "validation set",
    figure="test loss",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def beats_a_grid_inside_a_run_where_it_is_convex(seed: int) -> tuple[float, float]:
    """The same account."""
    done, budget = _hoag(seed, convex=True)
    return loss(done.model, seed, 2), best_of(seed, linear, grid(seed, levels(PENALTIES[1:], 3)), budget, convex=True)


@claim(
    "hoag",
    says="The same run reaches a lower test loss than the numbers that it starts from, kept for as long as it costs.",
    baseline="a run of as many steps as cost as much, with the three numbers fixed at the middles of their ranges",
    figure="test loss",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def beats_its_start_inside_a_run(seed: int) -> tuple[float, float]:
    """Whether what is gained comes from tuning, or from training longer than the runs of a search can."""
    done, budget = _hoag(seed, convex=True)
    middles = [(low * high) ** 0.5 for low, high in PENALTIES[1:]]
    return loss(done.model, seed, 2), loss(run(seed, linear(*middles), budget, regression(seed)).model, seed, 2)


# -- MAID --------------------------------------------------------------------------------------------------------------
@cache
def _maid(seed: int) -> tuple[Run, int]:
    """One run of softmax regression without bias, whose smoothness is bounded by its inputs, and its cost."""
    x = noisy_digits(seed)[1][0]
    smoothness = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1]) / 2
    tuner = MAID(
        convexity=LEAST, smoothness=smoothness, warmup=100, every=50, accuracy=10.0, step_size=10.0, budget=100
    )
    methods = linear(*numbers(PENALTIES[1:], [LEAST, 0.0, 0.0], [math.inf, 0.5, math.inf]))
    torch.manual_seed(seed)
    done = run(seed, [tuner, *methods], STEPS, nn.Sequential(nn.Linear(64, 10, bias=False)))
    return done, cost(done, tuner, (STEPS - 100) // 50)


@claim(
    "maid",
    says="In softmax regression, tuning decay, label smoothing and the z-loss's weight inside one run, by steps that "
    "are certain to descend, reaches a lower test loss than a grid search of the same cost.",
    baseline="runs of a grid with four levels of each of the three numbers, as many as cost as much; the best on the "
    "validation set",
    figure="test loss",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def certain_steps_beat_a_grid_inside_a_run(seed: int) -> tuple[float, float]:
    """The cost counts gradients and Hessian products, by the examples that they are of."""
    done, budget = _maid(seed)
    return loss(done.model, seed, 2), best_of(seed, linear, grid(seed, levels(PENALTIES[1:], 4)), budget, convex=True)


@claim(
    "maid",
    says="The same run reaches a lower test loss than the numbers that it starts from, kept for as long as it costs.",
    baseline="a run of as many steps as cost as much, with the three numbers fixed at the middles of their ranges",
    figure="test loss",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def certain_steps_beat_their_start_inside_a_run(seed: int) -> tuple[float, float]:
    """Whether what is gained comes from tuning, or from training longer than the runs of a search can."""
    done, budget = _maid(seed)
    middles = [(low * high) ** 0.5 for low, high in PENALTIES[1:]]
    return loss(done.model, seed, 2), loss(run(seed, linear(*middles), budget, regression(seed)).model, seed, 2)


# -- LV-HBA ------------------------------------------------------------------------------------------------------------
RADII = [(1.0, 16.0), (1.0, 16.0)]
"""Radii of the balls of the two layers."""
SEARCH = 9 * SHORT // 5
"""Steps of the search: each costs five gradients, and training anew under what it found costs `SHORT` further ones."""


def bound(first: Any, second: Any) -> list[Method]:
    """Return a ball for each layer."""
    return [NormBall(where="0", radius=first), NormBall(where="3", radius=second)]


@cache
def _radii(seed: int) -> Settings:
    """Return the bounds that one run finds from the low ends of the ranges."""
    tuner = LVHBA(step_size=0.3, lower_step_size=0.3, z_step_size=0.3, first_weight=1.0)
    bounds = bound(*(Tuned(start=low, name=str(i)) for i, (low, _) in enumerate(RADII)))
    done = run(seed, [tuner, *bounds], SEARCH, network(seed), SGD(lr=0.3, momentum=0.0))
    found = done.measures[repr(tuner)][-1]
    return found["0"], found["1"]


def _anew(seed: int, radii: Settings) -> float:
    """Return the test loss of a run under bounds."""
    return loss(run(seed, bound(*radii), SHORT, network(seed)).model, seed, 2)


@claim(
    "lv-hba",
    says="Bounds on the norms of two layers that are learned inside one run reach a lower test loss, trained anew, "
    "than those of a grid search of the same cost.",
    baseline="ten runs of a grid with four levels of each of the two bounds; the best on the validation set",
    figure="test loss of 200 steps under the bounds found",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def bounds_beat_a_grid_inside_a_run(seed: int) -> tuple[float, float]:
    """Bounds from 1 to 16; trained anew, for the weights of the search have learned from the validation set."""
    points = grid(seed, levels(RADII, 4))
    return _anew(seed, _radii(seed)), best_of(seed, bound, points, 10 * SHORT, convex=False)


@claim(
    "lv-hba",
    says="The same bounds reach a lower test loss than random search of the same cost.",
    baseline="ten runs with bounds drawn from the same ranges; the best on the validation set",
    figure="test loss of 200 steps under the bounds found",
    better="lower",
    seeds=8,
    first_seed=1000,
)
def bounds_beat_random_search_inside_a_run(seed: int) -> tuple[float, float]:
    """Bounds are uniform in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    points: list[Settings] = [tuple((16 ** torch.rand(2, generator=generator)).tolist()) for _ in range(10)]
    return _anew(seed, _radii(seed)), best_of(seed, bound, points, 10 * SHORT, convex=False)
