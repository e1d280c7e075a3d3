"""Golden trajectories: fifty steps of every rule on one problem, beside torch, the authors' code or the slow equation.

The problem holds a matrix, a vector, a scalar and a convolution's kernel under one loss; the rate is warmed up and
falls along a cosine; weights decay. All is float64, so that what is left between two codes is how they read the paper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait import catalogue
from plait.step.adagrad import AdaGrad, AdaGradNorm
from plait.step.adam import AdaBelief, Adam, AdamW
from plait.step.base import Rule
from plait.step.difference import MARS, Adan
from plait.step.factored import Adafactor
from plait.step.friction import DiffGrad
from plait.step.layerwise import LAMB, LARS
from plait.step.momentum import SGD, SGDW, Lion
from plait.step.normalized import ADOPT, LaProp
from plait.step.scale_invariant import SGDP, AdamP
from plait.step.signed import NormalizedSGD, SignSGD

STEPS = 50
SHAPES = {"matrix": (6, 5), "vector": (5,), "scalar": (), "kernel": (4, 2, 3, 3)}


class Problem(nn.Module):
    """tanh(x M) v s + normalize(K) * image = y: the kernel is normalized, as before a norm layer, the rest is not."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(numbers(*shape)))
        self.rows, self.images, self.target = numbers(16, 6), numbers(16, 2, 5, 5), numbers(16)

    def forward(self) -> Tensor:
        kernel = self.kernel / self.kernel.flatten(1).norm(dim=1)[:, None, None, None]
        seen = F.conv2d(self.images, kernel).square().mean((2, 3)).sum(1)
        found = torch.tanh(self.rows @ self.matrix) @ self.vector * self.scalar + seen
        return (found - self.target).square().mean()


def rate(step: int) -> float:
    """What the learning rate is multiplied by: a warmup over five steps, then a cosine to a tenth."""
    return min((step + 1) / 5, 0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def trajectory(
    make: Callable[[nn.Module], list[torch.optim.Optimizer]], schedule: Callable[[int], float] = rate
) -> Problem:
    """The problem after fifty steps of the optimizers."""
    model = Problem()
    rules = make(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(rule, schedule) for rule in rules]
    for _ in range(STEPS):
        model.zero_grad()
        model().backward()
        for acts in (*rules, *schedulers):
            acts.step()
    return model


def summary(model: nn.Module) -> list[float]:
    """One number for each weight: its elements times cos 1, cos 2, ..., added up."""
    sums = []
    for _, p in model.named_parameters():
        flat = p.detach().flatten()
        sums.append(float(flat @ torch.arange(1, len(flat) + 1, dtype=flat.dtype).cos()))
    return sums


def ours(rule: type[Rule], fields: dict[str, Any]) -> list[float]:
    return summary(trajectory(lambda model: [rule(model.named_parameters(), **fields)]))


# -- beside torch, which runs here
# -------------------------------------------------------------------------------------------
TORCH: dict[str, tuple[type[Rule], dict[str, Any], Any, dict[str, Any], float]] = {
    "adam": (Adam, {"lr": 0.03, "weight_decay": 0.1}, torch.optim.Adam, {}, 1e-11),
    "adamw": (AdamW, {"lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.95)}, torch.optim.AdamW, {}, 1e-11),
    "sgd": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD, {}, 1e-11),
    "sgd, nesterov": (
        SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        torch.optim.SGD,
        {},
        1e-11,
    ),
    "adagrad": (AdaGrad, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.Adagrad, {}, 1e-11),
    # torch bounds the second moment from below where the paper adds eps to the squares: both too small to be seen.
    "adafactor": (Adafactor, {"lr": 0.05, "weight_decay": 0.1}, torch.optim.Adafactor, {"eps": (1e-30, 1e-3)}, 1e-9),
}


@pytest.mark.parametrize("key", TORCH)
def test_fifty_steps_beside_torch(key: str) -> None:
    rule, fields, theirs, more, tolerance = TORCH[key]
    other = summary(trajectory(lambda model: [theirs(model.parameters(), **fields, **more)]))
    assert ours(rule, fields) == pytest.approx(other, rel=tolerance, abs=tolerance)


# -- beside the authors' code and pytorch_optimizer, run elsewhere
# -----------------------------------------------------------
# `summary` after `trajectory`, with the fields below; pytorch_optimizer 4.1.0 where no authors' package runs. adamp
# 0.3.0 adds 1e-8 to lengths. diffGrad_v2.py of shivram1987/diffGrad at 73233ba with torch's calls of today, and eps
# 1e-12, since it is added before the second moment is corrected. Lion, AdaBelief (without rectification) and signSGD
# are pytorch_optimizer's; the authors' own Lion and AdaBelief are in test_step.py. SGDP has Nesterov's momentum here:
# without it the authors' code writes the projected step into its running mean, which the paper does not. Adan is
# adan.py of sail-sg/Adan at 2c65bea, ADOPT adopt.py of iShohei220/adopt at 6468572 with decouple=True, MARS mars.py of
# AGI-Arena/MARS at 4831e28 with optimize_1d=True: its first change is g_1 itself, which here is clipped away.
# pytorch_optimizer's Adan is the same number for number; its ADOPT decays at the first step too, and its MARS corrects
# eps as well: they end 2e-2 and 1e-6 off.
AUTHORS: dict[str, tuple[type[Rule], dict[str, Any], list[float], float]] = {
    "lion": (
        Lion,
        {"lr": 0.01, "weight_decay": 0.1},
        [3.69109242, -1.43429242, -0.264905021, 1.97946205],
        1e-8,
    ),
    "adabelief": (
        AdaBelief,
        {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-12},
        [4.32661224, -1.33434834, -0.275901005, 0.0229863455],
        1e-8,
    ),
    "adamp": (
        AdamP,
        {"lr": 0.03, "weight_decay": 0.1},
        [3.9968629, -1.00955077, -0.281351151, -1.59023451],
        1e-8,
    ),
    "sgdp, nesterov": (
        SGDP,
        {"lr": 0.01, "weight_decay": 0.1, "nesterov": True},
        [1.75042632, -0.989908235, 0.228807853, 2.65242111],
        1e-8,
    ),
    "diffgrad": (
        DiffGrad,
        {"lr": 0.03, "weight_decay": 0.1, "eps": 1e-12},
        [4.09202113, -1.43779996, -0.251188303, 0.14712497],
        1e-8,
    ),
    "adan": (
        Adan,
        {"lr": 0.03, "weight_decay": 0.1},
        [4.26781426, -0.913177801, -0.204262412, -1.3092062],
        1e-8,
    ),
    "adopt": (
        ADOPT,
        {"lr": 0.03, "weight_decay": 0.1},
        [4.67216374, -1.21946654, -0.269320182, -1.87093969],
        1e-8,
    ),
    "adopt, of the conference": (
        ADOPT,
        {"lr": 0.003, "weight_decay": 0.1, "clipped": False},
        [3.13014777, -1.75256351, -0.383324242, 2.59829566],
        1e-8,
    ),
    "mars": (
        MARS,
        {"lr": 0.01, "weight_decay": 0.1},
        [3.52134946, -1.47083627, -0.266743941, 2.09045215],
        1e-8,
    ),
    "signsgd": (
        SignSGD,
        {"lr": 0.01, "weight_decay": 0.1},
        [3.55962941, -1.45353302, -0.264905021, 2.11402379],
        1e-8,
    ),
}


@pytest.mark.parametrize("key", AUTHORS)
def test_fifty_steps_beside_the_authors_code(key: str) -> None:
    rule, fields, numbers, tolerance = AUTHORS[key]
    assert ours(rule, fields) == pytest.approx(numbers, rel=tolerance, abs=tolerance)


def test_laprop_at_one_rate_beside_the_authors_code() -> None:
    """laprop.py of Z-T-WANG/LaProp-Optimizer at a419916 with torch's calls of today. Along a schedule it differs from
    the paper, as pytorch_optimizer's does: the running mean holds the rates of the steps that entered it.
    """
    model = trajectory(lambda model: [LaProp(model.named_parameters(), lr=0.01)], schedule=lambda step: 1.0)
    numbers = [4.31480517, -1.26063042, -0.301604953, -0.231709651]
    assert summary(model) == pytest.approx(numbers, rel=1e-8, abs=1e-8)


def test_what_is_particular_acts_in_these_fifty_steps() -> None:
    """The clipping of ADOPT, the correction of MARS, and where the means of Adan start."""
    for key, fields in (("adopt", {"clipped": False}), ("mars", {"gamma": 0.0}), ("adan", {"corrected": False})):
        rule, given, numbers, _ = AUTHORS[key]
        assert ours(rule, {**given, **fields}) != pytest.approx(numbers, rel=1e-3)


def test_the_projection_acts_in_these_fifty_steps() -> None:
    for key in ("adamp", "sgdp, nesterov"):
        rule, fields, numbers, _ = AUTHORS[key]
        assert ours(rule, {**fields, "delta": 0.0}) != pytest.approx(numbers, rel=1e-2)


# -- beside the slow equation, where other codes disagree with the paper or with each other
# ----------------------------------
Arrays = dict[str, np.ndarray]
Slow = Callable[[Arrays, Arrays, float, int, dict[str, Any]], Arrays]
"""(weights, gradients, lr, step from 1, memory) -> weights; weight decay is 0.1 everywhere."""


def norm(*arrays: np.ndarray) -> float:
    return math.sqrt(sum((a**2).sum() for a in arrays))


def slow_sgdw(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """Loshchilov & Hutter's Algorithm 1, decay times lr; pytorch_optimizer has lr outside the mean."""
    for n in w:
        memory[n] = 0.9 * memory.get(n, 0.0) + lr * g[n]
    return {n: w[n] - memory[n] - lr * 0.1 * w[n] for n in w}


def slow_laprop(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """Ziyin et al.'s algorithm, with decoupled decay; others hold the learning rate in the running mean."""
    for n in w:
        m, v = memory.get(n, (0.0, 0.0))
        v = 0.999 * v + 0.001 * g[n] ** 2
        m = 0.9 * m + 0.1 * g[n] / (np.sqrt(v / (1 - 0.999**t)) + 1e-15)
        memory[n] = m, v
        w[n] = w[n] - lr * (m / (1 - 0.9**t) + 0.1 * w[n])
    return w


def slow_lamb(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """You et al.'s Algorithm 2; pytorch_optimizer clips the lengths and leaves the corrections out by default."""
    for n in w:
        m, v = memory.get(n, (0.0, 0.0))
        m, v = 0.9 * m + 0.1 * g[n], 0.999 * v + 0.001 * g[n] ** 2
        memory[n] = m, v
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + 0.1 * w[n]
        w[n] = w[n] - lr * norm(w[n]) / norm(u) * u
    return w


def slow_lars(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """You et al.'s Algorithm 1; others scale the gradient before it enters the mean, or leave biases unscaled."""
    for n in w:
        memory[n] = 0.9 * memory.get(n, 0.0) + 0.1 * (g[n] + 0.1 * w[n])
        w[n] = w[n] - lr * norm(w[n]) / norm(memory[n]) * memory[n]
    return w


def slow_sgdp(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """Heo et al.'s Algorithm 1 without Nesterov's momentum, decay over 1 - momentum as in their code."""
    for n in w:
        memory[n] = step = 0.9 * memory.get(n, 0.0) + g[n]
        decay = 0.1 / (1 - 0.9)
        for rows in (len(w[n]), 1) if w[n].ndim > 1 else ():
            a, b, q = (x.reshape(rows, -1) for x in (w[n], g[n], step))
            if all(abs(x @ y) < 0.1 / math.sqrt(x.size) * norm(x) * norm(y) for x, y in zip(a, b, strict=True)):
                step = np.stack([p - (x @ p) / (x @ x) * x for x, p in zip(a, q, strict=True)]).reshape(w[n].shape)
                decay *= 0.1
                break
        w[n] = w[n] - lr * (step + decay * w[n])
    return w


def slow_normalized_sgd(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """Cutkosky & Mehta: one length for all weights; others normalize each weight alone."""
    for n in w:
        memory[n] = 0.9 * memory.get(n, 0.0) + 0.1 * g[n]
    length = norm(*memory.values())
    return {n: w[n] - lr * (memory[n] / length + 0.1 * w[n]) for n in w}


def slow_adagrad_norm(w: Arrays, g: Arrays, lr: float, t: int, memory: dict[str, Any]) -> Arrays:
    """Ward, Wu & Bottou: one b for all weights; AdAdaGrad's code has one for each row."""
    memory["b^2"] = memory.get("b^2", 0.1**2) + norm(*g.values()) ** 2
    return {n: w[n] - lr * (g[n] / math.sqrt(memory["b^2"]) + 0.1 * w[n]) for n in w}


EQUATIONS: dict[str, tuple[type[Rule], Slow, float]] = {
    "sgdw": (SGDW, slow_sgdw, 0.01),
    "laprop": (LaProp, slow_laprop, 0.01),
    "lamb": (LAMB, slow_lamb, 0.03),
    "lars": (LARS, slow_lars, 0.03),
    "sgdp": (SGDP, slow_sgdp, 0.01),
    "normalized-sgd": (NormalizedSGD, slow_normalized_sgd, 0.05),
    "adagrad-norm": (AdaGradNorm, slow_adagrad_norm, 1.0),
}


@pytest.mark.parametrize("key", EQUATIONS)
def test_fifty_steps_beside_the_equation(key: str) -> None:
    rule, slow, lr = EQUATIONS[key]
    model, memory = Problem(), dict[str, Any]()
    for step in range(STEPS):
        model.zero_grad()
        model().backward()
        weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
        stepped = slow(weights, gradients, lr * rate(step), step + 1, memory)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.tensor(stepped[n]))
    assert ours(rule, {"lr": lr, "weight_decay": 0.1}) == pytest.approx(summary(model), rel=1e-9, abs=1e-9)


# -- every rule is here, or beside another code or its equation in a file of its own
# ---------------------------------------------------------------------------------
ELSEWHERE = re.compile(r"def test_\w*(fifty|equation|authors|torch)")


def test_every_rule_has_its_trajectory() -> None:
    here = {name.partition(",")[0] for table in (TORCH, AUTHORS, EQUATIONS) for name in table}
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    elsewhere = [text for text in files if ELSEWHERE.search(text)]
    for key, entry in catalogue.load().items():
        if entry.places == ["step"] and isinstance(entry.make, type) and key not in here:
            stands = any(re.search(rf"\b{entry.name}\b", text) for text in elsewhere)
            assert stands, f"{key} has no trajectory: give it a row in tests/test_golden.py"
