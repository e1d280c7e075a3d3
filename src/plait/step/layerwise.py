"""Optimizers whose step is as long as the layer is large: LAMB and LARS, for large batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plait.catalogue import paper
from plait.fields import (
    Bounds,
    NonNegative,
    Probability,
    ScheduledNonNegative,
    ScheduledPositive,
    ScheduledProbability,
)
from plait.math.update_rule import maximum, minimum, where
from plait.method import method
from plait.step.adam import AdamW, corrections
from plait.step.base import Rule


def bounds(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the range that phi clips a weight's norm to."""
    least, most = group["norm_range"] or (0.0, math.inf)
    return {"least": least, "most": most}


def layer_ratio(weight_norm: Any, direction_norm: Any, *, least: float, most: float) -> Any:
    """phi(||w||) / ||direction||, with phi(z) = min(max(z, least), most); 1 where either is 0."""
    length = minimum(maximum(weight_norm, least), most)
    return where(length * direction_norm > 0, length / direction_norm, 1.0)


@paper("you2020large", key="lamb")
@method
class LAMB(Rule):
    """w <- w - lr * phi(||w||) / ||r + weight_decay * w|| * (r + weight_decay * w), r = m^ / (sqrt(v^) + eps).

    m^ and v^ are Adam's corrected means; the norms are those of each weight tensor. Algorithm 2 of You et al.: moments
    are corrected, the decay stands inside the norm, nothing else is clipped. phi is the identity, or clips to
    `norm_range`. Where a norm is 0 (a bias at its start) the ratio is 1: the paper does not say, and such a weight
    would never move. Raises BadInput for an lr or upper end of norm_range that is not above 0, betas outside [0, 1),
    other numbers below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> rule = LAMB([w], lr=0.1)
    >>> w.grad = torch.tensor([1.0, 1.0])
    >>> rule.step()
    >>> bool((w.detach() - torch.tensor([3.0, 4.0])).norm().isclose(torch.tensor(0.5)))
    True
    """

    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-6
    weight_decay: ScheduledNonNegative = 0.01
    norm_range: Bounds | None = None

    direction = staticmethod(AdamW.direction)
    trust = staticmethod(layer_ratio)

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return Adam's numbers and the range of phi."""
        return {**corrections(step, group), **bounds(group)}


@paper("you2020large", key="lars", kind="ground")
@method
class LARS(Rule):
    """m <- momentum * m + (1 - momentum) (g + weight_decay * w); w <- w - lr * phi(||w||) / ||m|| * m.

    Algorithm 1 of You et al. 2020 (the 2017 report scales the gradient before it enters the mean). Where a norm is 0
    the ratio is 1. phi is the identity, or clips to `norm_range`. Raises BadInput for an lr or upper end of norm_range
    that is not above 0, a momentum outside [0, 1), other numbers below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> rule = LARS([w], lr=0.1)
    >>> w.grad = torch.tensor([0.0, 7.0])
    >>> rule.step()
    >>> w.detach()
    tensor([3.0000, 3.5000])
    """

    lr: ScheduledPositive = 1e-2
    momentum: ScheduledProbability = 0.9
    weight_decay: ScheduledNonNegative = 0.0
    norm_range: Bounds | None = None

    @staticmethod
    def direction(weight: Any, gradient: Any, exp_avg: Any, *, momentum: float, weight_decay: float) -> tuple[Any, ...]:
        """Return (direction, m)."""
        exp_avg = momentum * exp_avg + (1 - momentum) * (gradient + weight_decay * weight)
        return exp_avg, exp_avg

    trust = staticmethod(layer_ratio)

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return the range of phi."""
        return bounds(group)
