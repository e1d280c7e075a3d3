"""Weights for the examples of a batch, from their own losses at this moment."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from plait.batch import IGNORE
from plait.catalogue import paper
from plait.data.base import Data
from plait.fields import ScheduledPositive
from plait.method import Misfit, Now, method

Strategy = Literal["linupper", "quadratic", "extremes"]


def loss_weights(losses: Tensor, strategy: Strategy, temperature: float) -> Tensor:
    """Return weights [n] of mean 1: n * softmax(f(h) / temperature), h the losses [n] mapped onto [-1, 1].

    f(h): "linupper" min(h + 1, 1), which lowers the easy half and caps the hard one; "quadratic" 1 - h^2, which favours
    the middle; "extremes" |h|, which favours both ends.

    >>> loss_weights(torch.tensor([0.0, 1.0, 2.0]), "linupper", 1.0)
    tensor([0.4661, 1.2670, 1.2670])
    """
    low, high = losses.min(), losses.max()
    h = (2 * losses - (high + low)) / (high - low).clamp_min(1e-6)
    shaped = {"linupper": (h + 1).clamp_max(1), "quadratic": 1 - h.square(), "extremes": h.abs()}[strategy]
    return len(losses) * torch.softmax(shaped / temperature, 0)


@paper("sow2025dynamic", key="loss-reweighting")
@method
class LossReweighting(Data):
    """w_i loss_i with w = n softmax(f(h(loss)) / temperature), h mapping the batch's losses onto [-1, 1].

    f: "linupper" min(h + 1, 1), "quadratic" 1 - h^2, "extremes" |h|. It wraps the misfit, so that the losses of the
    forward pass under way serve and nothing is computed twice; the weights are constants in the backward pass. The loss
    of an example of many tokens is their mean. Where a batch is worked through in micro-batches, or by several
    processes, the range and the softmax are of each part (the authors gather them over processes).

    temperature: greater than 0; the larger, the more uniform (the authors begin high, so that losses mean something
    first, then lower it: `Linear(start=100, end=1, until=0.1)`). Raises BadInput for a temperature that is not above 0,
    and for another strategy.

    >>> weighted = LossReweighting().loss(lambda output, target, now: output)
    >>> weighted(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 0, 0]), Now())
    tensor([0.0000, 1.2670, 2.5339])
    """

    strategy: Strategy = "linupper"
    temperature: ScheduledPositive = 1.0

    def loss(self, misfit: Misfit) -> Misfit:
        """Return the weighted misfit."""

        def weighted(output: Any, target: Tensor, now: Now) -> Tensor:
            value = misfit(output, target, now)
            counts = torch.ones_like(value) if target.is_floating_point() else (target != IGNORE).to(value.dtype)
            tokens = counts.reshape(len(value), -1).sum(1)
            mean = value.detach().reshape(len(value), -1).sum(1) / tokens.clamp_min(1)
            weight, counted = torch.ones_like(mean), tokens > 0
            if counted.any():
                weight[counted] = loss_weights(mean[counted], self.strategy, now.at(self.temperature))
            return value * weight.reshape(-1, *[1] * (value.dim() - 1))

        return weighted
