"""Hyperparameters that are tuned inside one run, against searches that cost as much."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.data.noise import InputNoise
from plait.forward.dropout import Dropout
from plait.loops.best_response import STN
from plait.loops.evidence import DataEmphasizedELBo
from plait.loops.implicit import BOREP
from plait.loss.smoothing import LabelSmoothing, ZLoss
from plait.method import Method
from plait.penalty.norm import L2, L2SP
from plait.predict.base import predictor
from plait.schedule import Tuned
from plait.step.adam import AdamW
from plait.train import Run, train

STEPS = 800
"""Of the run that tunes; with its validation passes and its wider layers it is charged as twice as many."""
SHORT = 200
"""Steps of each run of a search: eight of them cost what one run that tunes costs."""

Settings = tuple[float, ...]
Build = Callable[..., list[Method]]


@cache
def noisy_digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return 200 digits to train on, 200 to tune on, and 1397 to judge by, all with noise on their pixels."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    x = torch.tensor(inputs / 16.0, dtype=torch.float32)[order]
    x, y = x + 0.4 * torch.randn(x.shape, generator=generator), torch.tensor(targets)[order]
    return [(x[rows], y[rows]) for rows in (slice(0, 200), slice(200, 400), slice(400, None))]


def network(seed: int) -> nn.Module:
    """Return a network with one hidden layer, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 10))


def trained(seed: int, methods: Sequence[Method], steps: int, model: nn.Module | None = None) -> Run:
    """Return the run of a network on the training digits, tuned on the validation digits."""
    data, held, _ = noisy_digits(seed)
    options: dict[str, Any] = {"steps": steps, "batch_size": 50, "seed": seed, "validation": held}
    made = network(seed) if model is None else model
    return train(made, data, methods=[*methods, AdamW(lr=3e-3, weight_decay=0.0)], **options)


@torch.no_grad()
def loss(model: nn.Module, seed: int, part: int) -> float:
    """Return the cross entropy on the validation (1) or test (2) digits."""
    x, y = noisy_digits(seed)[part]
    return float(F.cross_entropy(model.eval()(x), y))


def searched(seed: int, build: Build, points: Sequence[Settings], model: Callable[[int], nn.Module] = network) -> float:
    """Return the test loss of the point with the least validation loss, of as many as the budget pays for."""
    models = [trained(seed, build(*point), SHORT, model(seed)).model for point in points[: 2 * STEPS // SHORT]]
    return loss(min(models, key=lambda model: loss(model, seed, 1)), seed, 2)


def grid(seed: int, levels: Sequence[Sequence[float]]) -> list[Settings]:
    """Return the points of a grid in a seeded order."""
    points = list(itertools.product(*levels))
    return [points[i] for i in torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).tolist()]


def drawn(seed: int, ranges: Sequence[tuple[float, float]]) -> list[Settings]:
    """Return random points, uniform in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    lows, highs = torch.tensor(ranges).log().unbind(1)
    places = torch.rand(2 * STEPS // SHORT, len(ranges), generator=generator)
    return [tuple(point) for point in (lows + (highs - lows) * places).exp().tolist()]


# -- self-tuning networks: five numbers of four kinds ----------------------------------------------------------------
RANGES = [(1e-4, 0.1), (1e-4, 0.1), (0.02, 0.4), (0.05, 0.7), (0.05, 0.8)]
"""Decay of each layer, label smoothing, dropout, input noise."""


def regularized(first: Any, second: Any, smoothing: Any, dropout: Any, noise: Any) -> list[Method]:
    """Return the methods that five numbers stand for."""
    return [
        InputNoise(strength=noise),
        Dropout(rate=dropout),
        LabelSmoothing(smoothing=smoothing),
        L2(where="0", strength=first),
        L2(where="3", strength=second),
    ]


@cache
def _self_tuned(seed: int) -> Run:
    """One run from the middle of each range, on the scale of logarithms."""
    ends = [float("inf"), float("inf"), 0.5, 0.9, float("inf")]
    middles = [(low * high) ** 0.5 for low, high in RANGES]
    knobs = [Tuned(start=s, high=e, name=str(i)) for i, (s, e) in enumerate(zip(middles, ends, strict=True))]
    return trained(seed, [STN(lr=0.03, warmup=50), *regularized(*knobs)], STEPS)


@claim(
    "stn",
    says="Tuning two decays, label smoothing, dropout and input noise in one run reaches a lower test loss than a grid "
    "search of the same cost.",
    baseline="eight runs of a grid with two levels of each of the five numbers; the best on the validation set",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def beats_a_grid(seed: int) -> tuple[float, float]:
    """The levels stand a quarter from each end of the range, on the scale of logarithms."""
    levels = [(low**0.75 * high**0.25, low**0.25 * high**0.75) for low, high in RANGES]
    return loss(_self_tuned(seed).model, seed, 2), searched(seed, regularized, grid(seed, levels))


@claim(
    "stn",
    says="The same run reaches a lower test loss than random search of the same cost.",
    baseline="eight runs with the five numbers drawn from the same ranges; the best on the validation set",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def beats_random_search(seed: int) -> tuple[float, float]:
    """Points are uniform in the logarithm."""
    return loss(_self_tuned(seed).model, seed, 2), searched(seed, regularized, drawn(seed, RANGES))


@claim(
    "stn",
    says="The path that the numbers take in a self-tuning run is worth more than the values at its end, kept fixed.",
    baseline="a run of as many steps with the five numbers fixed at where the self-tuning run ended",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def the_path_beats_its_end(seed: int) -> tuple[float, float]:
    """The paper's finding for dropout and its like."""
    run = _self_tuned(seed)
    found = next(iter(run.measures.values()))[-1]
    fixed = trained(seed, regularized(*(found[str(i)] for i in range(5))), STEPS)
    return loss(run.model, seed, 2), loss(fixed.model, seed, 2)


# -- implicit differentiation: four numbers of the objective ---------------------------------------------------------
PENALTIES = [(1e-4, 0.1), (1e-4, 0.1), (0.02, 0.4), (1e-4, 0.1)]
"""Decay of each layer, label smoothing, weight of the z-loss."""


def penalized(first: Any, second: Any, smoothing: Any, weight: Any) -> list[Method]:
    """Return the methods that four numbers stand for."""
    return [
        LabelSmoothing(smoothing=smoothing),
        ZLoss(strength=weight),
        L2(where="0", strength=first),
        L2(where="3", strength=second),
    ]


@cache
def _implicit(seed: int) -> Run:
    """One run from the middles: 150 steps of the numbers, each charged as five passes."""
    middles = [(low * high) ** 0.5 for low, high in PENALTIES]
    ends = [float("inf"), float("inf"), 0.5, float("inf")]
    numbers = [Tuned(start=s, high=e, name=str(i)) for i, (s, e) in enumerate(zip(middles, ends, strict=True))]
    tuner = BOREP(lr=0.05, linear_lr=0.02, warmup=50, lower_steps=5, upper_steps=1)
    return trained(seed, [tuner, *penalized(*numbers)], STEPS)


@claim(
    "bo-rep",
    says="Tuning two decays, label smoothing and the z-loss's weight in one run reaches a lower test loss than a grid "
    "search of the same cost.",
    baseline="eight runs of a grid with two levels of each of the four numbers; the best on the validation set",
    figure="test loss",
    better="lower",
)
def borep_beats_a_grid(seed: int) -> tuple[float, float]:
    """The levels stand a quarter from each end of the range, on the scale of logarithms."""
    levels = [(low**0.75 * high**0.25, low**0.25 * high**0.75) for low, high in PENALTIES]
    return loss(_implicit(seed).model, seed, 2), searched(seed, penalized, grid(seed, levels))


@cache
def _convex(seed: int) -> Run:
    """One run of softmax regression, whose objective is strongly convex, as the theory asks; otherwise the same."""
    ends = [float("inf"), 0.5, float("inf")]
    middles = [(low * high) ** 0.5 for low, high in PENALTIES[1:]]
    numbers = [Tuned(start=s, high=e, name=str(i)) for i, (s, e) in enumerate(zip(middles, ends, strict=True))]
    tuner = BOREP(lr=0.05, linear_lr=0.5, warmup=50, lower_steps=5, upper_steps=1)
    return trained(seed, [tuner, *linear(*numbers)], STEPS, regression(seed))


def regression(seed: int) -> nn.Module:
    """Return a linear classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 10))


def linear(decay: Any, smoothing: Any, weight: Any) -> list[Method]:
    """Return the methods that three numbers stand for."""
    return [LabelSmoothing(smoothing=smoothing), ZLoss(strength=weight), L2(strength=decay)]


@claim(
    "bo-rep",
    says="In softmax regression, which is convex as the theory asks, tuning decay, label smoothing and the z-loss's "
    "weight in one run reaches a lower test loss than a grid search of the same cost.",
    baseline="the eight runs of a grid with two levels of each of the three numbers; the best on the validation set",
    figure="test loss",
    better="lower",
)
def borep_beats_a_grid_where_it_is_convex(seed: int) -> tuple[float, float]:
    """The levels stand a quarter from each end of the range, on the scale of logarithms."""
    levels = [(low**0.75 * high**0.25, low**0.25 * high**0.75) for low, high in PENALTIES[1:]]
    return loss(_convex(seed).model, seed, 2), searched(seed, linear, grid(seed, levels), regression)


@claim(
    "bo-rep",
    says="The same run reaches a lower test loss than random search of the same cost.",
    baseline="eight runs with the three numbers drawn from the same ranges; the best on the validation set",
    figure="test loss",
    better="lower",
)
def borep_beats_random_search_where_it_is_convex(seed: int) -> tuple[float, float]:
    """Points are uniform in the logarithm."""
    return loss(_convex(seed).model, seed, 2), searched(seed, linear, drawn(seed, PENALTIES[1:]), regression)


@claim(
    "bo-rep",
    says="The same run reaches a lower test loss than the numbers that it starts from, kept for as long as it costs.",
    baseline="a run of twice as many steps with the three numbers fixed at the middles of their ranges",
    figure="test loss",
    better="lower",
)
def borep_beats_its_start_where_it_is_convex(seed: int) -> tuple[float, float]:
    """Whether what is gained comes from tuning, or from training longer than the runs of a search can."""
    middles = [(low * high) ** 0.5 for low, high in PENALTIES[1:]]
    fixed = trained(seed, linear(*middles), 2 * STEPS, regression(seed))
    return loss(_convex(seed).model, seed, 2), loss(fixed.model, seed, 2)


# -- the evidence bound: a network that is fine-tuned on few examples --------------------------------------------------
FEW = 100
"""Examples of the new task."""


@cache
def _pretrained(seed: int) -> dict[str, Tensor]:
    """Return the weights of a network that reads clean digits: the last 1397."""
    data = _turned(seed)[2]
    run = train(network(seed), data, methods=[AdamW(lr=3e-3, weight_decay=0.0)], steps=400, seed=seed)
    return {name: t.clone() for name, t in run.model.state_dict().items()}


@cache
def _turned(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return 100 noisy mirrored digits to fine-tune on, 300 to judge by, and the clean ones to pretrain on."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    x, y = torch.tensor(inputs / 16.0, dtype=torch.float32)[order], torch.tensor(targets)[order]
    mirrored = x[:400].view(-1, 8, 8).flip(2).reshape(-1, 64) + 0.2 * torch.randn(400, 64, generator=generator)
    return [(mirrored[:FEW], y[:FEW]), (mirrored[FEW:], y[FEW:400]), (x[400:], y[400:])]


def _tuned_from(seed: int, methods: Sequence[Method], rows: slice, steps: int) -> Run:
    """Return the run of the pretrained network with a new head, fine-tuned on some of the hundred examples."""
    model, (x, y) = network(seed), _turned(seed)[0]
    model.load_state_dict(_pretrained(seed))
    model[3].reset_parameters()  # type: ignore[index]
    options: dict[str, Any] = {"steps": steps, "batch_size": 50, "seed": seed}
    optimizer = AdamW(lr=3e-3, weight_decay=0.0)
    return train(model, (x[rows], y[rows]), methods=[*methods, optimizer], **options)


def _judged(run: Run, methods: Sequence[Method], data: tuple[Tensor, Tensor]) -> float:
    """Return the cross entropy of what a run predicts with its methods: the bound's, over the posterior."""
    with torch.no_grad():
        chances = predictor(methods)(run.model.eval(), data[0], run.now)
    return float(F.nll_loss(chances.clamp_min(1e-30).log(), data[1]))


@cache
def _emphasized(seed: int) -> float:
    """Return the test loss of the bound's run on all hundred examples."""
    methods = [DataEmphasizedELBo(head="3")]
    return _judged(_tuned_from(seed, methods, slice(None), STEPS), methods, _turned(seed)[1])


@claim(
    "de-elbo",
    says="Regularization that the data-emphasized bound learns reaches a lower test loss in transfer than a grid "
    "search of the same cost, which needs a validation set.",
    baseline="eight strengths of L2-SP (body) and L2 (head), a sixteenth of the steps each, on 80 of the 100 examples; "
    "the best on the other 20, trained on all of them for half of the steps",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def beats_a_grid_with_a_validation_set(seed: int) -> tuple[float, float]:
    """Strengths from 1e-4 to 1."""
    held, (x, y) = slice(80, None), _turned(seed)[0]
    short = STEPS // 16

    def methods(strength: float) -> list[Method]:
        return [L2SP(where="0", strength=strength), L2(where="3", strength=strength)]

    def of(strength: float) -> float:
        return _judged(_tuned_from(seed, methods(strength), slice(0, 80), short), [], (x[held], y[held]))

    best = min(torch.logspace(-4, 0, 8).tolist(), key=of)
    return _emphasized(seed), _judged(_tuned_from(seed, methods(best), slice(None), STEPS // 2), [], _turned(seed)[1])


@claim(
    "de-elbo",
    says="Without the emphasis, at kappa = 1, the same bound underfits: its test loss is higher.",
    baseline="the evidence lower bound, kappa = 1",
    figure="test loss",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def the_plain_bound_underfits(seed: int) -> tuple[float, float]:
    """The same run but for kappa."""
    methods = [DataEmphasizedELBo(head="3", emphasis=1.0)]
    return _emphasized(seed), _judged(_tuned_from(seed, methods, slice(None), STEPS), methods, _turned(seed)[1])
