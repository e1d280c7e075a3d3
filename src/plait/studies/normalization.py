"""What L2 regularization does to weights whose length does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput

Norm = Literal["batch", "layer", "none"]


@dataclass(frozen=True)
class NormalizedRun:
    """One run: with which decay and learning rate of the normalized weight, from which multiple of the start."""

    weight_decay: float
    learning_rate: float
    scale: float
    effective_rates: tuple[float, ...]
    """eta / |w|^2 at ten points of the run."""
    at_rest: float
    """sqrt(2 eta lambda) / |g|, the effective rate at which decay and growth of |w| would balance; 0 without decay."""
    predictions: Tensor
    """Class probabilities of the held-out examples [n, classes] after the run."""
    loss: float
    """Mean cross entropy of the held-out examples."""


@dataclass(frozen=True)
class L2VersusNormalization:
    """The runs of each decay, and of each again with (a^2 eta, lambda / a^2) from a times the start."""

    runs: tuple[NormalizedRun, ...]
    rescaled: tuple[NormalizedRun, ...]

    @property
    def difference(self) -> float:
        """The largest difference between the predictions of a run and its rescaled one: 0 for normalized weights."""
        pairs = zip(self.runs, self.rescaled, strict=True)
        return max(float((a.predictions - b.predictions).abs().max()) for a, b in pairs)


def _network(norm: Norm, seed: int, inputs: int, classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    kinds: dict[str, nn.Module] = {
        "batch": nn.BatchNorm1d(64, eps=1e-10),
        "layer": nn.LayerNorm(64, eps=1e-10),
        "none": nn.Identity(),
    }
    return nn.Sequential(nn.Linear(inputs, 64, bias=False), kinds[norm], nn.ReLU(), nn.Linear(64, classes))


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    inputs, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return (inputs / 16).double()[order], labels[order].long()


@paper("vanlaarhoven2017l2", key="l2-vs-norm", kind="study", theme="probe")
def l2_versus_normalization(
    *,
    norm: Norm = "batch",
    learning_rate: float = 0.1,
    weight_decays: Sequence[float] = (0.0, 1e-3, 1e-2),
    scale: float = 2.0,
    steps: int = 300,
    batch_size: int = 64,
    seed: int = 0,
) -> L2VersusNormalization:
    """L(a w) = L(w) makes grad L(a w) = grad L(w) / a: SGD with (eta, lambda) from w_0 and with (a^2 eta, lambda / a^2)
    from a w_0 give the same network at every step. The effective learning rate is eta / |w|^2.

    The study of "L2 Regularization versus Batch and Weight Normalization": a penalty lambda |w|^2 / 2 in front of a
    normalization layer does not regularize the function, it sets the length of w, and so how fast its direction learns.
    Trains a network of one hidden layer (norm: "batch", "layer", or "none" for comparison) on scikit-learn's digits
    with each decay of the hidden weight, and each again rescaled by `scale`; everything else is trained alike, without
    decay, in float64. A few seconds. Raises BadInput for numbers out of range.

    >>> found = l2_versus_normalization(weight_decays=[1e-2], steps=20)
    >>> found.difference < 1e-6
    True
    """
    if norm not in ("batch", "layer", "none"):
        raise BadInput(f"norm must be 'batch', 'layer' or 'none', not {norm!r}.")
    if learning_rate <= 0 or scale <= 0 or steps < 1 or not weight_decays or min(weight_decays) < 0:
        raise BadInput("learning_rate and scale must be greater than 0, steps at least 1, weight_decays at least 0.")
    x, y = _digits(seed)

    def run(decay: float, rate: float, factor: float) -> NormalizedRun:
        model = _network(norm, seed, x.shape[1], 10).double()
        with torch.no_grad():
            first: Any = model[0]
            first.weight.mul_(factor)
        return _trained(model, x, y, decay, rate, factor, learning_rate, steps, batch_size, seed)

    plain = tuple(run(decay, learning_rate, 1.0) for decay in weight_decays)
    again = tuple(run(decay / scale**2, learning_rate * scale**2, scale) for decay in weight_decays)
    return L2VersusNormalization(plain, again)


def _trained(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    decay: float,
    rate: float,
    factor: float,
    rest_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
) -> NormalizedRun:
    """Return what SGD makes of a network on the first 1200 examples, judged on the others."""
    weight: Any = model[0].weight
    others = [p for p in model.parameters() if p is not weight]
    groups: list[dict[str, Any]] = [{"params": [weight], "lr": rate, "weight_decay": decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=rest_rate)
    generator = torch.Generator().manual_seed(seed)
    rates, squares = [], []
    for step in range(steps):
        rows = torch.randint(0, 1200, (batch_size,), generator=generator)
        model.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        length = float(weight.detach().norm())
        if (step + 1) * 10 // steps != step * 10 // steps:
            rates.append(rate / length**2)
        if step >= steps - max(steps // 10, 1):
            squares.append((float(weight.grad.norm()) * length) ** 2)
        optimizer.step()
    with torch.no_grad():  # batch norm takes the held-out examples' own statistics: running ones remember the start
        logits = model(x[1200:])
    slope = (sum(squares) / len(squares)) ** 0.5
    rest = (2 * rate * decay) ** 0.5 / slope if slope else 0.0
    loss = float(F.cross_entropy(logits, y[1200:]))
    return NormalizedRun(decay, rate, factor, tuple(rates), rest, logits.softmax(-1), loss)
