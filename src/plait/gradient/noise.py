"""Noise on the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plait.catalogue import paper
from plait.fields import NonNegative
from plait.gradient.base import Gradient
from plait.method import Ask, Now, method
from plait.sharding import like


@paper("neelakantan2015noise", key="gradient-noise")
@method
class GradientNoise(Gradient):
    """g_t <- g_t + N(0, sigma_t^2),  sigma_t^2 = variance / (1 + t)^decay, at step t = 0, 1, ...

    variance: at least 0 (0.01, 0.3 or 1 in the paper); 0 is the plain gradient. decay: 0.55 there. The noise is drawn
    from the run's generator, alike on every process. Raises BadInput for numbers below 0, and in a run for a variance
    of 0.

    >>> GradientNoise(variance=1.0, decay=1.0).sigma(3)
    0.5
    """

    variance: NonNegative = 0.01
    decay: NonNegative = 0.55

    def sigma(self, step: int) -> float:
        """Return the standard deviation at a step."""
        return math.sqrt(self.variance / (1 + step) ** self.decay)

    def gradient(self, ask: Ask) -> Ask:
        """Return the oracle with noise added."""

        def noisy(model: nn.Module, now: Now) -> Tensor:
            value, sigma = ask(model, now), self.sigma(now.step)
            if sigma > 0:
                for _, gradient in self.gradients(model):
                    drawn = torch.randn(gradient.shape, generator=now.generator, device=now.generator.device)
                    gradient.add_(like(drawn.to(gradient.device, gradient.dtype), gradient), alpha=sigma)
            return value

        return noisy
