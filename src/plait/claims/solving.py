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
from plait.train import Run, train

STEPS = 400
"""Training steps of a run that tunes, each of 50 examples."""
WHOLE = 4
"""Batches in the 200 examples of the training set, and in those of the validation set."""
LEAST = 1e-3
"""The least decay of softmax regression, and so the convexity of its objective."""


def run(seed: int, methods: Sequence[Method], steps: int, model: nn.Module) -> Run:
    """Return the run of a model on the training digits, tuned on the validation digits."""
    data, held, _ = noisy_digits(seed)
    options: dict[str, Any] = {"steps": steps, "batch_size": 50, "seed": seed, "validation": held}
    return train(model, data, methods=[*methods, AdamW(lr=3e-3, weight_decay=0.0)], **options)


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
    seeds=24,
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
    seeds=24,
    first_seed=1000,
)
def beats_a_grid_inside_a_run_where_it_is_convex(seed: int) -> tuple[float, float]:
    """The same account."""
    done, budget = _hoag(seed, convex=True)
    return loss(done.model, seed, 2), best_of(seed, linear, grid(seed, levels(PENALTIES[1:], 3)), budget, convex=True)


# -- MAID --------------------------------------------------------------------------------------------------------------
@cache
def _maid(seed: int) -> tuple[Run, int]:
    """One run of softmax regression without bias, whose smoothness is bounded by its inputs, and its cost."""
    x = noisy_digits(seed)[1][0]
    smoothness = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1]) / 2
    tuner = MAID(convexity=LEAST, smoothness=smoothness, warmup=100, every=50, accuracy=10.0, step_size=10.0)
    methods = linear(*numbers(PENALTIES[1:], [LEAST, 0.0, 0.0], [math.inf, 0.5, math.inf]))
    torch.manual_seed(seed)
    done = run(seed, [tuner, *methods], STEPS, nn.Sequential(nn.Linear(64, 10, bias=False)))
    return done, cost(done, tuner, (STEPS - 100) // 50)


@claim(
    "maid",
    says="In softmax regression, tuning decay, label smoothing and the z-loss's weight inside one run, by steps that "
    "are certain to descend, reaches a lower test loss than a grid search of the same cost.",
    baseline="runs of a grid with three levels of each of the three numbers, as many as cost as much; the best on the "
    "validation set",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def certain_steps_beat_a_grid_inside_a_run(seed: int) -> tuple[float, float]:
    """The cost counts gradients and Hessian products, by the examples that they are of."""
    done, budget = _maid(seed)
    return loss(done.model, seed, 2), best_of(seed, linear, grid(seed, levels(PENALTIES[1:], 3)), budget, convex=True)


# -- LV-HBA ------------------------------------------------------------------------------------------------------------
RADII = [(0.5, 8.0), (0.5, 8.0)]
"""Radii of the balls of the two layers."""


def bound(first: Any, second: Any) -> list[Method]:
    """Return a ball for each layer."""
    return [NormBall(where="0", radius=first), NormBall(where="3", radius=second)]


@cache
def _lvhba(seed: int) -> Run:
    """One run from the middles: each step costs five gradients, one of them on a batch of the validation set."""
    tuner = LVHBA(step_size=0.1, lower_step_size=0.1, z_step_size=0.1, first_weight=0.3)
    return run(seed, [tuner, *bound(*numbers(RADII, [0.0, 0.0], [math.inf, math.inf]))], STEPS, network(seed))


@claim(
    "lv-hba",
    says="Learning a bound on the norm of each layer inside one run reaches a lower test loss than a grid search of "
    "the same cost.",
    baseline="ten runs of a grid with four levels of each of the two bounds; the best on the validation set",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def bounds_beat_a_grid_inside_a_run(seed: int) -> tuple[float, float]:
    """Bounds from 0.5 to 8."""
    points = grid(seed, levels(RADII, 4))
    return loss(_lvhba(seed).model, seed, 2), best_of(seed, bound, points, 5 * STEPS, convex=False)


@claim(
    "lv-hba",
    says="The bounds that it learns are better than none: the test loss is lower than that of a run without them which "
    "costs as much.",
    baseline="a run of five times as many steps without bounds, as it was at the best of ten points of validation",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def bounds_beat_none(seed: int) -> tuple[float, float]:
    """The baseline may stop early."""
    held: list[tuple[float, float]] = []

    def look(now: Any) -> None:
        if now.step % (STEPS // 2) == 0:
            held.append((loss(now.model, seed, 1), loss(now.model, seed, 2)))
            now.model.train()

    data, valid, _ = noisy_digits(seed)
    options: dict[str, Any] = {"steps": 5 * STEPS, "batch_size": 50, "seed": seed, "validation": valid}
    train(network(seed), data, methods=[AdamW(lr=3e-3, weight_decay=0.0)], on_step=look, **options)
    return loss(_lvhba(seed).model, seed, 2), min(held)[1]


