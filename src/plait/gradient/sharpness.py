"""Flat minima: the gradient is asked at weights that are moved to where the loss, or its gradient, is worst nearby.

All of them ask at the same micro-batches with the same random numbers (the same dropout) in every call of a step, since
each is a function of one loss; running statistics of normalization come from the first call alone. Weights are put
back from copies, bitwise. The objective that is returned is the one at the weights themselves.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import Count, Positive, ScheduledNonNegative
from plait.gradient.base import TINY, Gradient, Neighbourhood, along, norm
from plait.method import Ask, Now, method


@paper("foret2021sam", key="sam", kind="ground")
@method
class SAM(Gradient):
    """grad L(w + radius * g / |g|_2),  g = grad L(w): the gradient at the worst weights in a ball, to first order.

    radius: at least 0, or a schedule; 0 is the plain gradient. |g| is over all parameters that `where` names. 2 calls.
    Raises BadInput for a radius below 0, and in a run for one that stays 0.

    >>> SAM(radius=0.1).calls
    2
    """

    radius: ScheduledNonNegative = 0.05

    calls: ClassVar[int] = 2
    idle: ClassVar[dict[str, float]] = {"radius": 0}

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle at the moved weights."""

        def sharp(model: nn.Module, now: Now) -> Tensor:
            radius, near = now.at(self.radius), Neighbourhood(ask, model, now, self.parameters(model))
            if radius > 0:
                near.at(along(near.here, radius))
            return near.value

        return sharp


@paper("zheng2021amp", key="amp")
@method
class AMP(Gradient):
    """grad L(w + d),  d <- d + rate * grad L(w + d), scaled back to |d|_2 = radius where it is longer; `ascents` times.

    The objective is max_{|d| <= radius} L(w + d), over a ball of all parameters together as published. ball="tensor"
    bounds each tensor by itself, which is what the authors' code does.

    radius: at least 0, or a schedule (0.5 in the paper, for convolutional networks); 0 is the plain gradient. rate: the
    inner learning rate, 1 there. ascents: 1 there. 1 + ascents calls. Raises BadInput for a radius below 0, a rate that
    is not above 0, ascents below 1, another ball, and in a run a radius that stays 0.

    >>> AMP(ascents=2).calls
    3
    """

    radius: ScheduledNonNegative = 0.5
    rate: Positive = 1.0
    ascents: Count = 1
    ball: Literal["model", "tensor"] = "model"

    idle: ClassVar[dict[str, float]] = {"radius": 0}

    @property
    def calls(self) -> int:  # type: ignore[override]
        """How often a step asks."""
        return 1 + self.ascents

    def project(self, offsets: list[Tensor], radius: float) -> list[Tensor]:
        """Return the offsets scaled into the ball."""
        norms = [norm([o]) for o in offsets] if self.ball == "tensor" else [norm(offsets)] * len(offsets)
        return [o * (radius / (n + TINY)).clamp(max=1).to(o.dtype) for o, n in zip(offsets, norms, strict=True)]

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle at the perturbed weights."""

        def perturbed(model: nn.Module, now: Now) -> Tensor:
            radius, near = now.at(self.radius), Neighbourhood(ask, model, now, self.parameters(model))
            offsets, uphill = [torch.zeros_like(g) for g in near.here], near.here
            for _ in range(self.ascents if radius > 0 else 0):
                offsets = self.project([o + self.rate * g for o, g in zip(offsets, uphill, strict=True)], radius)
                uphill = near.at(offsets)
            return near.value

        return perturbed


@paper("zhang2023gam", key="gam")
@method
class GAM(Gradient):
    """grad L(w) + strength * h,  h = radius * grad |grad L|(w'),  w' = w + radius * f / |f|,  f = grad |grad L|(w).

    First-order flatness, radius * max_{|w' - w| <= radius} |grad L(w')|, is minimized too. The gradient of a gradient's
    norm is the Hessian times the unit gradient, taken as a difference over `difference`:
    grad |grad L|(w) ~ (grad L(w + difference * g / |g|) - g) / difference, g = grad L(w). 4 calls.

    The authors' code asks at the same four points but mixes what it finds differently (it takes a projection of two
    of the gradients off the other two, with four weights of its own); here the published update is made.

    strength, radius: at least 0; 0 is the plain gradient (their values here are no figures of the paper; the authors'
    code takes a radius of 0.2 for small images). difference: greater than 0, 0.02 to 0.04 there. Raises BadInput for
    numbers outside these ranges, and in a run for a strength or a radius that stays 0.

    >>> GAM().calls
    4
    """

    strength: ScheduledNonNegative = 0.3
    radius: ScheduledNonNegative = 0.1
    difference: Positive = 0.02

    calls: ClassVar[int] = 4
    idle: ClassVar[dict[str, float]] = {"strength": 0, "radius": 0}

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle with the gradient of first-order flatness added."""

        def flat(model: nn.Module, now: Now) -> Tensor:
            strength, radius = now.at(self.strength), now.at(self.radius)
            near = Neighbourhood(ask, model, now, self.parameters(model))
            if strength == 0 or radius == 0:
                return near.value

            def steepening(start: list[Tensor], *offsets: list[Tensor]) -> list[Tensor]:
                """`difference` * grad |grad L| at the weights plus the offsets, where the gradient is `start`."""
                further = near.at(*offsets, along(start, self.difference))
                return [g - s for g, s in zip(further, start, strict=True)]

            uphill = along(steepening(near.here), radius)
            steeper = steepening(near.at(uphill), uphill)
            scale = strength * radius / self.difference
            near.leave([g + scale * h for g, h in zip(near.here, steeper, strict=True)])
            return near.value

        return flat
