"""Optimizers that do not lengthen a weight whose length means nothing, being normalized after: SGDP and AdamP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.catalogue import paper
from plait.fields import (
    Fraction,
    NonNegative,
    Probability,
    ScheduledNonNegative,
    ScheduledPositive,
    ScheduledProbability,
)
from plait.math.update_rule import sqrt, where
from plait.method import method
from plait.step.adam import AdamW, corrections
from plait.step.base import Rule
from plait.step.momentum import SGD


@method
class Tangent(Rule):
    """q = p - (w^ . p) w^ if |cos(w, g)| < delta / sqrt(dim w), else p; w <- w - lr (q + ratio * weight_decay * w).

    p: the direction of the rule without this. w^ = w / ||w||. Each row of a weight (what makes one output of a layer or
    convolution) is a vector w if all rows pass the test, else the whole weight is, if it passes. Where a weight passes
    its length has no effect on the loss, so decay is multiplied by `decay_ratio`. Weights of less than two dimensions
    are left as they are, as in the authors' code. Zeros, which have no direction, pass.

    delta: at least 0; 0 projects nothing. decay_ratio: in [0, 1].
    """

    weight_decay: ScheduledNonNegative = 0.0
    delta: NonNegative = 0.1
    decay_ratio: Fraction = 0.1

    of_matrices = ("delta",)

    @staticmethod
    def perpendicular(inner: Any, weight_norm: Any, gradient_norm: Any, count: Any, *, delta: float) -> Any:
        """|<w, g>| / (||w|| ||g||) < delta / sqrt(count)."""
        length = weight_norm * gradient_norm
        return abs(inner) * sqrt(count) < delta * where(length > 0, length, 1.0)

    @staticmethod
    def radial(inner: Any, weight_norm: Any, *, weight_decay: float, decay_ratio: float) -> Any:
        """What of w is added to the direction: less what it has along w (its decay is such), and the weaker decay."""
        return decay_ratio * weight_decay - where(weight_norm > 0, inner / weight_norm / weight_norm, 0.0)


@paper("heo2021adamp", key="adamp")
@method
class AdamP(Tangent):
    """AdamW without the part of its step along a scale-invariant weight: p = m^ / (sqrt(v^) + eps), see `Tangent`.

    Heo et al., Algorithm 2. Momentum makes weights whose scale means nothing (those before a normalization) longer, and
    a longer weight turns by a smaller angle: steps die away early. AdamP takes the lengthening out. Which weights these
    are is found at every step, from their gradients. Decay is decoupled, as AdamW's.

    betas in [0, 1); eps and weight_decay at least 0. Weights of any shape and real dtype; bad values raise BadInput.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> rule = AdamP([w], lr=0.1)
    >>> w.grad = torch.tensor([[-0.8, 0.6]])
    >>> rule.step()
    >>> w.detach().norm() - 5 < 0.01, w.detach()[0, 0] > 3
    (tensor(True), tensor(True))
    """

    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-8

    direction = staticmethod(AdamW.direction)
    scalars = staticmethod(corrections)


@paper("heo2021adamp", key="sgdp", kind="ground")
@method
class SGDP(Tangent):
    """SGD without the part of its step along a scale-invariant weight: p = m, m <- momentum * m + g, see `Tangent`.

    Heo et al., Algorithm 1; with `nesterov`, p = g + momentum * m. Decay is decoupled and, as in the authors' code,
    divided by 1 - momentum, so that it is as strong as an L2 penalty that enters the mean. Their code without Nesterov
    writes the projected step into its running mean; here the mean stays as the equation has it. Raises BadInput for an
    lr that is not above 0, a momentum outside [0, 1), a delta below 0, a decay_ratio outside [0, 1], complex weights
    and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> rule = SGDP([w], lr=0.1)
    >>> w.grad = torch.tensor([[-0.8, 0.6]])
    >>> rule.step()
    >>> w.detach()
    tensor([[3.0800, 3.9400]])
    """

    lr: ScheduledPositive = 1e-2
    momentum: ScheduledProbability = 0.9
    nesterov: bool = False

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
        momentum_buffer = momentum * momentum_buffer + gradient
        step = of_gradient * gradient + of_buffer * momentum_buffer
        return step + weight_decay * weight, momentum_buffer

    @classmethod
    def scalars(cls, step: int, group: Mapping[str, Any]) -> dict[str, float]:
        """Return how much of the gradient and of the running mean a step takes, and the decay's strength."""
        decay = group["weight_decay"] / (1 - group["momentum"])
        return {**SGD.scalars(step, group), "weight_decay": decay}
