"""What a grown network must reach: perceptrons that read digits, two of width 32 grown to one of 64."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from plait.claims.base import claim
from plait.claims.digits import best_test_loss, digits
from plait.initialize.growth import MixtureGrowth
from plait.method import Method
from plait.step.adam import AdamW
from plait.tensors import write_tensors
from plait.train import train

RATES = (1e-3, 3e-3, 1e-2)
ALONE, TOGETHER = 100, 30
"""Steps of a member, and of the grown network."""
AS_LONG = TOGETHER + 2 * ALONE // 4
"""Steps of the wide network that cost as much: a layer of half the width takes a quarter of the products."""


def _network(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    inner = [part for _ in range(2) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *inner, nn.Linear(width, 10))


@cache
def _members(seed: int) -> tuple[str, str]:
    """Return the files of two networks of half the width, each trained alone."""
    inputs, targets = digits(seed)
    folder, paths = Path(tempfile.mkdtemp(prefix="plait-growth-")), []
    for number in range(2):
        methods: list[Method] = [MixtureGrowth(), AdamW(lr=3e-3)]
        model = _network(2 * seed + number, 32)
        train(model, (inputs[:1000], targets[:1000]), methods=methods, steps=ALONE, seed=2 * seed + number)
        write_tensors(folder / f"{number}.safetensors", model.state_dict())
        paths.append(str(folder / f"{number}.safetensors"))
    return paths[0], paths[1]


@cache
def _wide(seed: int, start: Method | None, steps: int) -> float:
    """Return the test loss of a network of width 64, at the best of three rates."""
    return best_test_loss(seed, partial(_network, 1000 + seed, 64), [] if start is None else [start], RATES, steps)


@claim(
    "mixture-growth",
    says="Grown from two networks of half its width, a network reads better after 30 steps.",
    baseline="the same width from scratch for 30 steps, each at the best of three rates",
    figure="test loss on digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def growth_starts_ahead(seed: int) -> tuple[float, float]:
    """Members of 100 steps."""
    return _wide(seed, MixtureGrowth(sources=_members(seed)), TOGETHER), _wide(seed, None, TOGETHER)


@claim(
    "mixture-growth",
    says="It reads better at equal cost: with the members' steps, a quarter as dear each, counted.",
    baseline="the same width from scratch for 80 steps, each at the best of three rates",
    figure="test loss on digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def growth_pays(seed: int) -> tuple[float, float]:
    """30 + 2 * 100 / 4 steps."""
    return _wide(seed, MixtureGrowth(sources=_members(seed)), TOGETHER), _wide(seed, None, AS_LONG)


@claim(
    "mixture-growth",
    says="New combinations of the members' templates read better after 30 steps than blocks that begin at zero.",
    baseline="the same members side by side, all other blocks begun at zero",
    figure="test loss on digits",
    better="lower",
    seeds=24,
    first_seed=1000,
)
def recombination_helps(seed: int) -> tuple[float, float]:
    """Orthogonal coefficients of length one, or zero."""
    ours, theirs = (MixtureGrowth(sources=_members(seed), scale=scale) for scale in (1.0, 0.0))
    return _wide(seed, ours, TOGETHER), _wide(seed, theirs, TOGETHER)
