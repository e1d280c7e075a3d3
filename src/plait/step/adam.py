"""Optimizers with a running mean and a running square: Adam, AdamW, AdaBelief."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plait.catalogue import paper
from plait.fields import NonNegative, Probability, ScheduledNonNegative, ScheduledPositive
from plait.math.update_rule import sqrt
from plait.method import method
from plait.step.base import Rule


def corrections(step: int, group: Mapping[str, Any]) -> dict[str, float]:
    """Return both betas, and 1 - beta^t, the part of a mean's weight that has been given out by step t."""
    beta1, beta2 = group["betas"]
    return {"beta1": beta1, "beta2": beta2, "correction1": 1 - beta1**step, "correction2": 1 - beta2**step}


def normalized_decay(value: float, steps: int, lr: float) -> float:
    """Return the weight decay of a run of that many steps: value * sqrt(1 / steps) / lr.

    Loshchilov & Hutter's normalized decay lambda_norm * sqrt(b / (B T)) (batch size b, B examples, T epochs, so
    B T / b steps), which stays good when the budget changes. Their decay is not multiplied by the learning rate, ours
    is, as in torch: hence the division.

    >>> round(normalized_decay(0.05, steps=10_000, lr=1e-3), 6)
    0.5
    """
    return value * math.sqrt(1 / steps) / lr


@paper("kingma2015adam", key="adam", kind="ground")
@method
class Adam(Rule):
    """m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Kingma & Ba's Adam; `weight_decay` is the L2 penalty's: it is added to the gradient, g <- g + weight_decay * w.
    Raises BadInput for an lr that is not above 0, betas outside [0, 1), an eps or weight_decay below 0, complex weights
    and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = Adam([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.01])
    >>> rule.step()
    >>> w.detach()
    tensor([0.9000, 1.1000])
    """

    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-8
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
        gradient = gradient + weight_decay * weight
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
        return (1 / correction1) * exp_avg / (sqrt((1 / correction2) * exp_avg_sq) + eps), exp_avg, exp_avg_sq

    scalars = staticmethod(corrections)


@paper("loshchilov2019decoupled", key="adamw")
@method
class AdamW(Rule):
    """w <- w - lr (m^ / (sqrt(v^) + eps) + weight_decay * w), with Adam's corrected means m^ and v^.

    Loshchilov & Hutter's Adam with decoupled weight decay. As in torch, the decay is multiplied by the learning rate
    and follows its schedule; the paper multiplies it by the schedule alone (`normalized_decay` converts). Warm
    restarts, the paper's AdamWR, are `lr=Cosine(peak=..., cycles=...)`; SGDW stands in `plait.step.momentum`.

    betas in [0, 1); eps and weight_decay at least 0. Weights of any shape and real dtype; bad values raise BadInput.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = AdamW([w], lr=0.1, weight_decay=0.5)
    >>> w.grad = torch.tensor([3.0, -0.01])
    >>> rule.step()
    >>> w.detach()
    tensor([0.8500, 1.0500])
    """

    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: ScheduledNonNegative = 0.01

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
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
        step = (1 / correction1) * exp_avg / (sqrt((1 / correction2) * exp_avg_sq) + eps)
        return step + weight_decay * weight, exp_avg, exp_avg_sq

    scalars = staticmethod(corrections)


@paper("zhuang2020adabelief", key="adabelief")
@method
class AdaBelief(Rule):
    """m <- b1 m + (1 - b1) g; s <- b2 s + (1 - b2) (g - m)^2 + eps; w <- w - lr m^ / (sqrt(s^) + eps).

    m^ = m / (1 - b1^t), s^ = s / (1 - b2^t): Adam with the distance of the gradient from its own mean in place of its
    square. `eps` stands inside the second moment as well, and adds up there, as in the paper's algorithm. No
    rectification of the first steps: the authors' package turns it on by default, the paper has none. `weight_decay` is
    decoupled, as AdamW's. eps = 1e-16 is what the authors advise. Raises BadInput for an lr that is not above 0, betas
    outside [0, 1), an eps or weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> rule = AdaBelief([w], lr=0.1)
    >>> w.grad = torch.tensor([2.0])
    >>> rule.step()
    >>> w.detach()
    tensor([0.8889])
    """

    lr: ScheduledPositive = 1e-3
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-16
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        exp_avg: Any,
        exp_avg_var: Any,
        *,
        beta1: float,
        beta2: float,
        correction1: float,
        correction2: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m, s)."""
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        surprise = gradient - exp_avg
        exp_avg_var = beta2 * exp_avg_var + (1 - beta2) * surprise * surprise + eps
        step = (1 / correction1) * exp_avg / (sqrt((1 / correction2) * exp_avg_var) + eps)
        return step + weight_decay * weight, exp_avg, exp_avg_var

    scalars = staticmethod(corrections)
