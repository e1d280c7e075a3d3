"""An optimizer that slows down where the gradient no longer changes: diffGrad."""

from __future__ import annotations

from typing import Any

from plait.catalogue import paper
from plait.fields import NonNegative, Probability, ScheduledNonNegative
from plait.math.update_rule import exp, sqrt
from plait.method import method
from plait.step.adam import corrections
from plait.step.base import Rule


@paper("dubey2020diffgrad", key="diffgrad")
@method
class DiffGrad(Rule):
    """w <- w - lr xi m^ / (sqrt(v^) + eps), xi = 1 / (1 + exp(-|g_(t-1) - g_t|)), with Adam's means m^ and v^.

    Dubey et al. The friction xi lies in [1/2, 1): an element whose gradient stays as it is, near an optimum, takes half
    of Adam's step, one whose gradient changes takes all of it. g_0 = 0. It compares gradients by their absolute size,
    so unlike Adam it is not indifferent to the scale of the loss. `weight_decay` is the L2 penalty's, as in the
    authors' code; the paper has none.

    The authors' first code keeps a reference to the gradient in place of a copy, and xi is then 1/2 always; the paper's
    equation, and their second code, are followed. There eps is added before v is corrected, here after, as the paper
    does. Raises BadInput for an lr that is not above 0, betas outside [0, 1), an eps or weight_decay below 0, complex
    weights and sparse gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> rule = DiffGrad([w], lr=0.1)
    >>> w.grad = torch.tensor([0.001, 10.0])
    >>> rule.step()
    >>> w.detach()
    tensor([-0.0500, -0.1000])
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
        previous: Any,
        *,
        beta1: float,
        beta2: float,
        correction1: float,
        correction2: float,
        eps: float,
        weight_decay: float,
    ) -> tuple[Any, ...]:
        """Return (direction, m, v, gradient)."""
        gradient = gradient + weight_decay * weight
        exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
        step = (1 / correction1) * exp_avg / (sqrt((1 / correction2) * exp_avg_sq) + eps)
        return step / (1 + exp(-abs(previous - gradient))), exp_avg, exp_avg_sq, gradient

    scalars = staticmethod(corrections)
