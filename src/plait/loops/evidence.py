"""Regularization that is learned on the training set alone, by a bound of the evidence that leans towards the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plait.catalogue import paper
from plait.errors import BadInput
from plait.fields import Positive, Size
from plait.gradient.base import Gradient
from plait.layers import matches
from plait.loops.tuning import adam_step
from plait.method import Ask, Now, Predictor, method
from plait.parametrize.freeze import is_fresh
from plait.passes import kept
from plait.sharding import full, like


@dataclass(frozen=True)
class Group:
    """Weights that share the variance of their prior, and the names of the centres that its mean holds, if not 0."""

    title: str
    named: list[tuple[str, nn.Parameter]]
    centred: bool

    def count(self) -> int:
        """Return how many weights there are."""
        return sum(p.numel() for _, p in self.named)


def divergence(count: int, square: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Return (KL(N(m, s^2 I) | N(mu, v I)), v) at the prior variance v that makes it least, in closed form:
    v = s^2 + |m - mu|^2 / D, where it is D / 2 log(v / s^2).

    count: D. square: |m - mu|^2. deviation: s.

    >>> divergence(2, torch.tensor(6.0), torch.tensor(1.0))
    (tensor(1.3863), tensor(4.))
    """
    variance = deviation.square() + square / count
    return count / 2 * (variance / deviation.square()).log(), variance


@paper("harvey2026learning", key="de-elbo", theme="bilevel")
@method
class DataEmphasizedELBo(Gradient):
    """min_{m, s} E[mean misfit at m + s e] + KL / (kappa N), kappa = D / N; KL = sum over groups g of
    D_g / 2 log(v_g / s^2), v_g = s^2 + |m_g - mu_g|^2 / D_g: the data-emphasized evidence lower bound.

    The strength of L2 or L2-SP is learned with the weights, on all the data, with no validation set: the posterior is
    N(m, s^2 I), the prior N(mu_g, v_g I), and v_g is always where the bound is best. Left at kappa = 1 the bound of a
    model with many more weights D than examples N pulls the posterior to the prior, and underfits; kappa = D / N raises
    the likelihood to the size of the rest. The weights' gradient gets (m - mu) / (kappa N v): L2 of that strength. It
    stands in the figures of `measure`, with the variances ("body", "head") and s.

    center: "start", each weight where training began, but for new heads, at 0, with a variance of their own (L2-SP);
    "zero", one group around 0 (L2). head: names of more weights or layers that count as new. emphasis: kappa, or None
    for D / N. scale: the first s (the authors' 1e-4 takes thousands of steps to grow from); Adam learns its inverse
    softplus, once a step, at the rate lr. samples: draws of the posterior over which predictions are averaged; 0
    predicts at m. One e is drawn for a step. where: the weights that have a posterior; others are trained plainly.
    Let the optimizer decay nothing. A copy of the weights is kept for "start". The model that is left is m.

    >>> from plait import train
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> bound = DataEmphasizedELBo(center="zero")
    >>> run = train(nn.Linear(3, 1), (x, x.sum(1)), methods=[bound], steps=20)
    >>> sorted(run.measures[repr(bound)][-1])
    ['body strength', 'body variance', 'scale', 'step']
    """

    center: Literal["start", "zero"] = "start"
    head: str = ""
    emphasis: Positive | None = None
    scale: Positive = 0.01
    lr: Positive = 0.01
    samples: Size = 10

    excludes: ClassVar[tuple[str, ...]] = ("STN",)  # whose responses are no weights of a posterior

    def groups(self, model: nn.Module) -> list[Group]:
        """Return the weights that have a posterior, by prior."""
        named = list(self.parameters(model))
        if self.center == "zero":
            return [Group("body", named, False)] if named else []
        new = {name for name, _ in named if self.is_new(model, name)}
        parts = [
            Group("body", [(name, p) for name, p in named if name not in new], True),
            Group("head", [(name, p) for name, p in named if name in new], False),
        ]
        return [group for group in parts if group.named]

    def is_new(self, model: nn.Module, name: str) -> bool:
        """Say whether a weight is of a head that is new with the task."""
        layer = name.rpartition(".")[0]
        return is_fresh(model, layer) or (bool(self.head) and (matches(self.head, name) or matches(self.head, layer)))

    def initialize(self, model: nn.Module, now: Now) -> None:
        """Keep where the weights begin."""
        groups, memory = self.groups(model), now.of(self)
        if not groups:
            raise BadInput("DataEmphasizedELBo finds no trained weight: name in where some that are.")
        memory["spread"] = torch.tensor(math.log(math.expm1(self.scale)))
        for group in groups:
            for name, p in group.named if group.centred else []:
                memory[f"start {name}"] = p.detach().clone(memory_format=torch.contiguous_format)

    def distances(self, group: Group, now: Now) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield (weight, its distance to the prior's mean) of a group, in float32."""
        memory = now.of(self)
        for name, p in group.named:
            start = like(memory[f"start {name}"].to(p.device, p.dtype), p) if group.centred else 0.0
            yield p, (p.detach() - start).float()

    def square(self, group: Group, now: Now) -> Tensor:
        """Return the squared distance of a group's weights, together, to the prior's mean."""
        return torch.stack([full(d.square().sum()) for _, d in self.distances(group, now)]).sum().cpu()

    def share(self, groups: list[Group], now: Now) -> float:
        """Return 1 / (kappa N), what the divergence is multiplied by beside the mean misfit."""
        if self.emphasis is None:
            return 1 / sum(group.count() for group in groups)
        if not now.examples:
            raise BadInput("DataEmphasizedELBo(emphasis=...) needs plait.train, which knows the number of examples.")
        return 1 / (self.emphasis * now.examples)

    def gradient(self, ask: Ask) -> Ask:
        """Ask at a draw of the posterior; add the gradient of the divergence, and move s."""

        def asking(model: nn.Module, now: Now) -> Tensor:
            memory, groups = now.of(self), self.groups(now.model)
            first, spread = self.spread(now)
            deviation = F.softplus(spread)
            weights = [p for group in groups for _, p in group.named]
            noise = [like(torch.randn(p.shape, generator=now.generator).to(p.device, p.dtype), p) for p in weights]
            with kept(weights):
                with torch.no_grad():
                    for p, e in zip(weights, noise, strict=True):
                        p.add_(e, alpha=float(deviation))
                value = ask(model, now)
            products = [e * p.grad for p, e in zip(weights, noise, strict=True) if p.grad is not None]
            slope = sum(float(full(product.sum())) for product in products)
            share = self.share(groups, now)
            bound, slope_of_bound = self.pull(groups, now, deviation, share)
            if first:
                adam_step(memory, "spread", (slope + slope_of_bound) * torch.sigmoid(spread), self.lr)
            now.parts = now.parts | {type(self).__name__: bound}
            return value + bound

        return asking

    def spread(self, now: Now) -> tuple[bool, Tensor]:
        """Say whether this step is asked about for the first time, and return the raw s that the whole step has.

        A method around this one asks again, at weights that it has moved: s learns at the weights themselves.
        """
        memory = now.of(self)
        first = "step" not in memory or int(memory["step"]) != now.step
        if first:
            memory["step"], memory["spread of step"] = torch.tensor(now.step), memory["spread"].clone()
        return first, memory["spread of step"]

    @torch.no_grad()
    def pull(self, groups: list[Group], now: Now, deviation: Tensor, share: float) -> tuple[float, float]:
        """Add share * dKL/dm to the gradients; return (share * KL, its derivative in s)."""
        bound, slope = 0.0, 0.0
        for group in groups:
            square = self.square(group, now)
            kl, variance = divergence(group.count(), square, deviation)
            for p, d in self.distances(group, now):
                pulled = (d * (share / float(variance))).to(p.dtype)
                p.grad = pulled if p.grad is None else p.grad + pulled
            bound += share * float(kl)
            slope += share * group.count() * float(deviation / variance - 1 / deviation)
        return bound, slope

    def predict(self, predictor: Predictor) -> Predictor:
        """Average predictions over the posterior; the weights are put back bitwise."""

        def averaged(model: nn.Module, inputs: Any, now: Now) -> Tensor:
            memory = now.of(self)
            if not self.samples or "spread" not in memory:
                return predictor(model, inputs, now)
            weights = [p for _, p in self.parameters(model)]
            deviation, found = float(F.softplus(memory["spread"])), []
            for _ in range(self.samples):
                with kept(weights):
                    with torch.no_grad():
                        for p in weights:
                            p.add_(torch.randn(p.shape, generator=now.generator).to(p), alpha=deviation)
                    found.append(predictor(model, inputs, now))
            return torch.stack(found).mean(0)

        return averaged

    @torch.no_grad()
    def measure(self, model: nn.Module, now: Now) -> dict[str, Any]:
        """Return s, and each group's prior variance and strength of L2."""
        groups, deviation = self.groups(model), F.softplus(now.of(self)["spread"])
        figures: dict[str, Any] = {"scale": float(deviation)}
        for group in groups:
            square = self.square(group, now)
            variance = float(divergence(group.count(), square, deviation)[1])
            figures[f"{group.title} variance"] = variance
            figures[f"{group.title} strength"] = self.share(groups, now) / variance
        return figures
