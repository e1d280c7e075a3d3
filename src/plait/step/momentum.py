"""Optimizers with one running mean: SGD with momentum, SGDW, and Lion, which keeps the mean's sign only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.catalogue import paper
from plait.fields import Probability, ScheduledNonNegative, ScheduledPositive, ScheduledProbability
from plait.math.update_rule import sign
from plait.method import method
from plait.step.base import Rule


@paper("sutskever2013importance", key="sgd", kind="ground")
@method
class SGD(Rule):
    """g <- g + weight_decay * w; m <- momentum * m + g; w <- w - lr m, or lr (g + momentum * m) with `nesterov`.

    Momentum as torch has it, without dampening; `weight_decay` is the L2 penalty's. momentum in [0, 1). Raises BadInput
    for another momentum, an lr that is not above 0, a weight_decay below 0, complex weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> rule = SGD([w], lr=0.1, momentum=0.5)
    >>> for _ in range(2):
    ...     w.grad = torch.ones(1)
    ...     rule.step()
    >>> w.detach()
    tensor([0.7500])
    """

    lr: ScheduledPositive = 1e-2
    momentum: ScheduledProbability = 0.9
    nesterov: bool = False
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any,
        gradient: Any,
        momentum_buffer: Any,
        *,
        momentum: float,
        of_gradient: float,
        of_buffer: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m)."""
        gradient = gradient + weight_decay * weight
        momentum_buffer = momentum * momentum_buffer + gradient
        return of_gradient * gradient + of_buffer * momentum_buffer, momentum_buffer

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return how much of the gradient and of the running mean a step takes."""
        ahead = bool(group["nesterov"])
        return {"of_gradient": float(ahead), "of_buffer": group["momentum"] if ahead else 1.0}


@paper("loshchilov2019decoupled", key="sgdw", kind="ground")
@method
class SGDW(Rule):
    """m <- momentum * m + lr g; w <- w - m - lr * weight_decay * w.

    SGD with decoupled weight decay (Loshchilov & Hutter). The learning rate enters the running mean, so a change of
    rate reaches the weights over the next steps. The decay is multiplied by the learning rate, as AdamW's. Raises
    BadInput for an lr that is not above 0, a momentum outside [0, 1), a weight_decay below 0, complex weights and
    sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> rule = SGDW([w], lr=0.1, weight_decay=0.5)
    >>> w.grad = torch.ones(1)
    >>> rule.step()
    >>> w.detach()
    tensor([0.8500])
    """

    lr: ScheduledPositive = 1e-2
    momentum: ScheduledProbability = 0.9
    weight_decay: ScheduledNonNegative = 0.01

    @staticmethod
    def direction(
        weight: Any, gradient: Any, momentum_buffer: Any, *, lr: float, momentum: float, weight_decay: float
    ) -> tuple[Any, ...]:
        """Return (direction, m); the rate is 1."""
        momentum_buffer = momentum * momentum_buffer + lr * gradient
        return momentum_buffer + lr * weight_decay * weight, momentum_buffer

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return the rate 1: the learning rate stands in the direction."""
        return {"rate": 1.0}


@paper("chen2023symbolic", key="lion")
@method
class Lion(Rule):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + weight_decay * w); then m <- b2 m + (1 - b2) g.

    Chen et al.'s optimizer found by program search: every element moves by the same length, one state in place of
    Adam's two. Its learning rate wants to be 3 to 10 times smaller than AdamW's, and its decay as much larger. Raises
    BadInput for an lr that is not above 0, betas outside [0, 1), a weight_decay below 0, complex weights and sparse
    gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> rule = Lion([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.01])
    >>> rule.step()
    >>> w.detach()
    tensor([0.9000, 1.1000])
    """

    lr: ScheduledPositive = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    weight_decay: ScheduledNonNegative = 0.0

    @staticmethod
    def direction(
        weight: Any, gradient: Any, exp_avg: Any, *, beta1: float, beta2: float, weight_decay: float
    ) -> tuple[Any, ...]:
        """Return (direction, m)."""
        step = sign(beta1 * exp_avg + (1 - beta1) * gradient)
        return step + weight_decay * weight, beta2 * exp_avg + (1 - beta2) * gradient

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return both betas."""
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2}
