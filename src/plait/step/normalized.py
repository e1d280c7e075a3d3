"""Optimizers whose running mean is of gradients that are normalized already: LaProp, ADOPT.

Adam divides the mean by the root of the running square; a gradient that is divided first enters the mean with about the
same length as all others, and no later change of the running square can make an old one large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plait.catalogue import paper
from plait.fields import NonNegative, Probability, ScheduledNonNegative, ScheduledPositive
from plait.math.update_rule import maximum, minimum, sqrt
from plait.method import method
from plait.step.adam import corrections
from plait.step.base import Rule


@paper("ziyin2020laprop", key="laprop", kind="ground")
@method
class LaProp(Rule):
    """v <- b2 v + (1 - b2) g^2; m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps); w <- w - lr m / (1 - b1^t).

    Ziyin et al. Momentum and adaptivity no longer meet in one fraction: no step exceeds lr / sqrt(1 - b2), whatever the
    betas, where Adam's steps have no bound once b1 > sqrt(b2). At b2 = 0 it is the mean of the gradient's signs.

    The paper's equation is followed. In the authors' code the learning rate enters the running mean, so the two agree
    while the rate is constant; and their decay, taken after the step, is not multiplied by the learning rate, where
    `weight_decay` here is decoupled as AdamW's. Raises BadInput for an lr that is not above 0, betas outside [0, 1), an
    eps or weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = LaProp([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.01])
    >>> rule.step()
    >>> w.detach()
    tensor([0.9000, 1.1000])
    """

    lr: ScheduledPositive = 4e-4
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-15
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        *,
        beta1: float,
        beta2: float,
        correction1: float,
        correction2: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m, v)."""
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
        exp_avg = beta1 * exp_avg + (1 - beta1) * (gradient / (sqrt((1 / correction2) * exp_avg_sq) + eps))
        return (1 / correction1) * exp_avg + weight_decay * weight, exp_avg, exp_avg_sq

    scalars = staticmethod(corrections)


@paper("taniguchi2024adopt", key="adopt", kind="ground")
@method
class ADOPT(Rule):
    """m <- b1 m + (1 - b1) clip(g / max(sqrt(v), eps), t^(1/4)); w <- w - lr m; then v <- b2 v + (1 - b2) g^2.

    Taniguchi et al. The gradient is divided by a v that does not hold it yet, and only then enters the mean: so the
    rule converges at any b2, where Adam needs one that fits the problem. t counts from 0: the first step makes v = g^2
    and moves nothing, not by decay either. No correction of means.

    clipped: hold each element of the normalized gradient to [-t^(1/4), t^(1/4)], as the final version of the paper
    does: an element whose first gradient is next to nothing would take a huge step otherwise. False is the conference
    version. `weight_decay` is decoupled, as AdamW's; in the authors' code it is an L2 penalty's unless one asks.
    pytorch_optimizer decays the weights at the first step too. Raises BadInput for an lr that is not above 0, betas
    outside [0, 1), an eps or weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = ADOPT([w], lr=0.1)
    >>> for gradient in ([2.0, 4.0], [2.0, -2.0]):
    ...     w.grad = torch.tensor(gradient)
    ...     rule.step()
    >>> w.detach()
    tensor([0.9900, 1.0050])
    """

    betas: tuple[Probability, Probability] = (0.9, 0.9999)
    eps: NonNegative = 1e-6
    clipped: bool = True
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        *,
        beta1: float,
        kept: float,
        most: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m, v)."""
        normalized = minimum(maximum(gradient / maximum(sqrt(exp_avg_sq), eps), -most), most)
        exp_avg = beta1 * exp_avg + (1 - beta1) * normalized
        return exp_avg + weight_decay * weight, exp_avg, kept * exp_avg_sq + (1 - kept) * gradient * gradient

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return b1, how much of v stays, what the normalized gradient is held to, and the decay: at first 0 each."""
        beta1, beta2 = group["betas"]
        if step == 1:
            return {"beta1": beta1, "kept": 0.0, "most": 0.0, "weight_decay": 0.0}
        return {"beta1": beta1, "kept": beta2, "most": (step - 1) ** 0.25 if group["clipped"] else math.inf}
