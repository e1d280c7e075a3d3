"""Claims of fine-tuning in rounds: a small transformer reads handwritten digits as eight rows of eight pixels.

It has learned upright digits, and is fine-tuned on digits that are turned by a quarter; every setting is chosen by what
a user would have, a validation split of the turned ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.claims.base import claim
from plait.claims.low_rank import state_bytes
from plait.claims.step import Split, digits, error, misfit
from plait.step.adam import AdamW
from plait.step.base import Rule
from plait.step.layer_sampling import HFT, LISA

RATES = [1e-3, 3e-3, 1e-2]


class Attention(nn.Module):
    """Attention with four matrices and two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.o_proj(mixed)
        return out


class Gated(nn.Module):
    """A gated feed-forward part with three matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """A layer as in Llama: each part reads its norm and adds to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(width), Gated(width)
        self.input_norm, self.middle_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        x = x + self.self_attn(self.input_norm(x))
        out: Tensor = x + self.mlp(self.middle_norm(x))
        return out


class Reader(nn.Module):
    """64 pixels -> 8 tokens -> `depth` layers -> 10 classes."""

    def __init__(self, width: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 64] -> [n, 10]."""
        x = self.embed(x.reshape(-1, 8, 8)) + self.place
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def fitted(model: nn.Module, rule: Rule, split: Split, seed: int, steps: int) -> nn.Module:
    """Return the model after so many steps on batches of 32, the learning rate falling linearly to 0."""
    torch.manual_seed(seed)
    optimizer = rule.optimizer(model.named_parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    draw = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        rows = torch.randint(0, len(split[0]), (32,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(split[0][rows]), split[1][rows]).backward()
        optimizer.step()
        scheduler.step()
    return model


def started(seed: int) -> nn.Module:
    """Return a reader that has seen nothing."""
    torch.manual_seed(seed)
    return Reader()


@cache
def base(seed: int) -> nn.Module:
    """Return a reader of upright digits."""
    return fitted(started(seed), AdamW(lr=3e-3), digits(seed)[0], seed, 300)


def turned(split: Split) -> Split:
    """Return the same digits, turned by a quarter."""
    return split[0].reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1), split[1]


def tuned(make: Callable[[float], Rule], seed: int) -> nn.Module:
    """Return the base after 100 steps on turned digits, at the rate whose validation misfit on them is lowest."""
    train, validation, _ = map(turned, digits(seed))
    models = [fitted(copy.deepcopy(base(seed)), make(rate), train, seed + 100, 100) for rate in RATES]
    return min(models, key=lambda m: misfit(m, validation))


@claim(
    "lisa",
    says="with one of four layers at a time, LISA's gradients and states take at most 60 percent of AdamW's room",
    baseline="AdamW on all layers",
    figure="bytes of gradients and states a weight, the most in 60 steps with redraws every 5",
    better="lower",
    margin=0.4 * 12,
    seeds=3,
)
def most_bytes(seed: int) -> tuple[float, float]:
    """Measured in memory after every step; embedding, head and last norm are always trained."""
    found = []
    for rule in (LISA(layers=1, period=5), AdamW()):
        model, most = started(seed), 0
        torch.manual_seed(seed)
        optimizer = rule.optimizer(model.named_parameters())
        x, y = digits(seed)[0]
        for step in range(60):
            rows = slice(step % 12 * 32, step % 12 * 32 + 32)
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            held = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
            optimizer.step()
            most = max(most, held + state_bytes(optimizer))
        found.append(most / sum(p.numel() for p in model.parameters()))
    return found[0], found[1]


@claim(
    "lisa",
    says="drawing the trained layer anew leaves a lower test misfit than a layer drawn once, in the same room",
    baseline="one of four layers drawn once, with the embedding and the head; as many learning rates tried",
    figure="test cross entropy on turned digits, best of 3 rates on validation",
    better="lower",
    seeds=10,
    first_seed=100,
)
def drawn_anew(seed: int) -> tuple[float, float]:
    """Rounds of 5 of 100 steps, against one round."""
    test = turned(digits(seed)[2])
    ours = misfit(tuned(lambda lr: LISA(lr=lr, layers=1, period=5), seed), test)
    return ours, misfit(tuned(lambda lr: LISA(lr=lr, layers=1, period=100), seed), test)


@claim(
    "lisa",
    says="LISA, training one of four layers at a time, reaches at least AdamW's test misfit plus 0.05",
    baseline="AdamW on all layers, as many learning rates tried",
    figure="test cross entropy on turned digits, best of 3 rates on validation",
    better="lower",
    seeds=10,
    first_seed=100,
    margin=-0.05,
)
def as_good_as_all_layers(seed: int) -> tuple[float, float]:
    """Rounds of 5 of 100 steps."""
    test = turned(digits(seed)[2])
    ours = misfit(tuned(lambda lr: LISA(lr=lr, layers=1, period=5), seed), test)
    return ours, misfit(tuned(lambda lr: AdamW(lr=lr), seed), test)


@claim(
    "hft",
    says="after fine-tuning half of every layer on turned digits, fewer upright ones are forgotten",
    baseline="AdamW on all weights, as many learning rates tried",
    figure="test error in percent on upright digits, best of 3 rates on validation of turned ones",
    better="lower",
    seeds=10,
    first_seed=100,
)
def forgets_less(seed: int) -> tuple[float, float]:
    """The rate is chosen by the new digits alone."""
    test = digits(seed)[2]
    return error(tuned(lambda lr: HFT(lr=lr), seed), test), error(tuned(lambda lr: AdamW(lr=lr), seed), test)


@claim(
    "hft",
    says="at the same learning rates, fine-tuning half of every layer on turned digits forgets fewer upright ones",
    baseline="AdamW on all weights, at the same rates",
    figure="test error in percent on upright digits, mean over 3 rates",
    better="lower",
    seeds=10,
    first_seed=200,
)
def forgets_less_at_the_same_rates(seed: int) -> tuple[float, float]:
    """The paper's comparison. Where each chooses its rate, the rate matters more to what is forgotten than the half."""
    train, test = turned(digits(seed)[0]), digits(seed)[2]

    def mean(make: Callable[[float], Rule]) -> float:
        models = [fitted(copy.deepcopy(base(seed)), make(rate), train, seed + 100, 100) for rate in RATES]
        return sum(error(model, test) for model in models) / len(models)

    return mean(lambda lr: HFT(lr=lr)), mean(lambda lr: AdamW(lr=lr))


@claim(
    "hft",
    says="half of every layer learns turned digits to at least the full model's test error plus two percentage points",
    baseline="AdamW on all weights, as many learning rates tried",
    figure="test error in percent on turned digits, best of 3 rates on their validation",
    better="lower",
    seeds=10,
    first_seed=100,
    margin=-2.0,
)
def learns_as_much(seed: int) -> tuple[float, float]:
    """The same runs as of forgetting."""
    test = turned(digits(seed)[2])
    return error(tuned(lambda lr: HFT(lr=lr), seed), test), error(tuned(lambda lr: AdamW(lr=lr), seed), test)
